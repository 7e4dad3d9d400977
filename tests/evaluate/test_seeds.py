"""`preftree compare --seeds`: several seeds of a recipe as one run, with the question as the unit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import preftree
from preftree.cli import app
from preftree.errors import RunError
from preftree.evaluate.seeds import find_seeds
from preftree.evaluate.statistics import sign_flips
from tests.support.evaluations import write_evaluation, write_heldout

BASE = [0, 0, 0, 0, 1, 1, 1, 0]
SEEDS = ([1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 0])


def recipe(place: Path, heldout: bool = False) -> tuple[str, str]:
    """A base and a recipe of three seeds; a folder without an evaluation lies beside them."""
    base = write_evaluation(place / "base", BASE)
    folders = [write_evaluation(place / "orca" / f"seed-{n}", values) for n, values in enumerate(SEEDS)]
    (place / "orca" / "notes").mkdir()
    for n, folder in enumerate((base, *folders) if heldout else ()):
        write_heldout(folder, [-1.0 + n, 1.0 + n, -4.0 + n])
    return str(base), str(place / "orca")


def test_a_question_is_its_mean_over_the_seeds(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["compare", *recipe(tmp_path, heldout=True), "--seeds", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    base, orca = content["models"]
    assert (orca["name"], [seed["tasks"]["toy"]["score"] for seed in orca["seeds"]]) == ("orca", [0.5, 0.5, 0.75])
    assert orca["tasks"]["toy"]["score"] == pytest.approx(14 / 24)
    (found,) = content["differences"]
    task = found["tasks"]["toy"]
    assert task["mean"] == pytest.approx(14 / 24 - base["tasks"]["toy"]["score"])
    # In thirds of a question: 3, 2 and 1 gained, 1 lost.
    assert task["p"] == pytest.approx(sign_flips(np.array([3, 2, 1, -1])))
    assert (task["test"], task["gained"], task["lost"]) == ("sign flips, exact", 3, 1)
    assert found["flipped"]["toy"] == {"gained": ["toy 0", "toy 1", "toy 2"], "lost": ["toy 6"]}
    # Chosen answers that are the more probable ones: 1 of 3 before; 1 (a margin of 0 is none), 2 and 2 after.
    assert found["heldout"]["margin"]["mean"] == pytest.approx(2.0)
    assert base["heldout"]["accuracy"] == pytest.approx(1 / 3)
    assert orca["heldout"]["accuracy"] == pytest.approx((1 + 2 + 2) / 9)
    written = (tmp_path / "out" / "compare.md").read_text()
    assert "orca, averages by seed: 50.00, 50.00, 75.00 (standard deviation 14.43)" in written
    assert "| difference | **+20.83** (" in written


def test_copies_of_one_seed_prove_no_more_than_it_does(tmp_path: Path) -> None:
    base = write_evaluation(tmp_path / "base", BASE)
    write_evaluation(tmp_path / "one" / "seed-1", SEEDS[0])
    for n in range(5):
        write_evaluation(tmp_path / "five" / f"seed-{n}", SEEDS[0])
    one, five = preftree.compare(base, tmp_path / "one", tmp_path / "five", seeds=True)
    assert (one.tasks["toy"].test, five.tasks["toy"].test) == ("McNemar exact", "sign flips, exact")
    assert five.tasks["toy"].p == pytest.approx(one.tasks["toy"].p)
    assert five.tasks["toy"].low == pytest.approx(one.tasks["toy"].low)
    assert five.tasks["toy"].detectable == pytest.approx(one.tasks["toy"].detectable)


def test_what_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    base, orca = recipe(tmp_path)
    with pytest.raises(RunError, match=r"holds 3 evaluations .* preftree compare --seeds"):
        preftree.compare(base, orca)
    with pytest.raises(RunError, match="no folder in it holds an evaluation"):
        preftree.compare(base, base, seeds=True)
    write_heldout(tmp_path / "orca" / "seed-1", [1.0])
    with pytest.raises(RunError, match=r"seed-0 has no held-out pairs, .*seed-1 has"):
        find_seeds(orca)
    (tmp_path / "orca" / "seed-1" / "preferences.jsonl").unlink()
    write_evaluation(tmp_path / "orca" / "seed-9", [1, 1])
    with pytest.raises(RunError, match=r"seed-9 cannot be compared(.|\n)*questions: 8 and 2"):
        preftree.compare(base, orca, seeds=True)
