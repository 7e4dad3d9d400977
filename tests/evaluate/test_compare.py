"""Comparisons of folders: damage is named, foreign names are shown and not obeyed, held-out pairs are part of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from preftree.cli import app
from preftree.errors import RunError
from preftree.evaluate import compare
from preftree.evaluate.results import find_results
from preftree.io.markdown import cell
from tests.support.evaluations import write_evaluation, write_heldout

HOSTILE = "\x1b[31m<script>alert(1)</script>|*a*\u202e"


def test_held_out_pairs_are_compared(tmp_path: Path) -> None:
    a, b = write_evaluation(tmp_path / "a", [0, 1, 1]), write_evaluation(tmp_path / "b", [1, 1, 1])
    write_heldout(a, [1.0, -1.0, -2.0, 3.0]), write_heldout(b, [2.0, 1.0, 1.0, 4.0])
    compare.run([str(a), str(b)], str(tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [model["heldout"]["accuracy"] for model in content["models"]] == [0.5, 1.0]
    heldout = content["differences"][0]["heldout"]
    assert (heldout["accuracy"]["gained"], heldout["accuracy"]["lost"]) == (2, 0)
    assert heldout["margin"]["mean"] == pytest.approx(1.75)
    assert "4 held-out pairs" in (tmp_path / "out" / "compare.md").read_text()


def test_held_out_pairs_of_one_run_only(tmp_path: Path) -> None:
    a, b = write_evaluation(tmp_path / "a", [0, 1]), write_evaluation(tmp_path / "b", [1, 1], name="tuned")
    write_heldout(b, [1.0])
    compare.run([str(a), str(b)], str(tmp_path / "out"))
    assert "scored for tuned only" in (tmp_path / "out" / "compare.md").read_text()
    write_heldout(a, [1.0], first=7)
    with pytest.raises(RunError, match="held-out pairs: 1 and 1, not all the same"):
        compare.run([str(a), str(b)], None)


def test_foreign_names_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        write_evaluation(tmp_path / str(i), [0, 1, i], name=HOSTILE, task=f"toy{HOSTILE[1:5]}") for i in range(2)
    ]
    compare.run([str(folder) for folder in folders], str(tmp_path / "out"))
    written = (tmp_path / "out" / "compare.md").read_text()
    shown = capsys.readouterr().out
    for said in (written, shown):
        assert "\x1b[31m" not in said
        assert "\u202e" not in said
    assert "<script" not in written
    assert "&lt;script&gt;" in written
    assert cell("a|b\n*c* <d> `e`") == r"a\|b \*c\* &lt;d&gt; \`e\`"


def test_the_leaderboard_shows_a_hostile_name(evaluated: Callable[..., Path], models: Path, capsys: Any) -> None:
    adapter = models / f"x{HOSTILE.replace('/', '')}"
    shutil.copytree(models / "adapter", adapter, dirs_exist_ok=True)
    evaluated("out", adapter=str(adapter))
    said = capsys.readouterr()
    assert "\x1b[31m" not in said.out + said.err
    assert "\u202e" not in said.out + said.err


def damaged(place: Path, how: str) -> None:
    results, samples = place / "results_2026.json", place / "samples_toy_2026.jsonl"
    content = json.loads(results.read_text())
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    match how:
        case "cut results":
            results.write_text(results.read_text()[:40])
        case "a list":
            results.write_text("[]")
        case "no config":
            results.write_text(json.dumps(content | {"configs": {"toy": None}}))
        case "no task":
            results.write_text(json.dumps(content | {"configs": {}}))
        case "odd groups":
            results.write_text(json.dumps(content | {"group_subtasks": {"toy": 3}}))
        case "a cut sample":
            samples.write_text(samples.read_text()[:-30])
        case "no sample":
            samples.write_text("")
        case "another value":
            samples.write_text("".join(json.dumps(row | {"acc": "x"}) + "\n" for row in rows))
        case "no number":
            samples.write_text("".join(json.dumps(row | {"acc": float("nan")}) + "\n" for row in rows))
        case "no hash":
            rows[1].pop("prompt_hash")
            samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "an odd id":
            samples.write_text("".join(json.dumps(row | {"doc_id": "a"}) + "\n" for row in rows))
        case "no object":
            samples.write_text("3\n")
        case "bytes":
            samples.write_bytes(b"\xff\xfe\x00\n")
        case "held-out pairs":
            (place / "preferences.jsonl").write_text('{"pair": "a", "chosen": "x"}\n')


@pytest.mark.parametrize(
    "how",
    [
        "cut results", "a list", "no config", "no task", "odd groups", "a cut sample", "no sample", "another value",
        "no number", "no hash", "an odd id", "no object", "bytes", "held-out pairs",
    ],
)  # fmt: skip
def test_damaged_results_are_named(how: str, tmp_path: Path) -> None:
    good, bad = write_evaluation(tmp_path / "good", [0, 1, 1]), write_evaluation(tmp_path / "bad", [1, 1, 1])
    damaged(bad, how)
    for folders in ([good, bad], [bad, good]):
        result = CliRunner().invoke(app, ["compare", *map(str, folders)])
        assert result.exit_code == 2, result.exception
        assert "is damaged" in result.output or "hold no number for its metric" in result.output, result.output


def test_groups_that_hold_themselves_end(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a", [0, 1], group_subtasks={"g": ["g", "h"], "h": ["g", "toy"]})
    assert set(find_results(str(folder)).scores) <= {"g", "h", "toy"}


def test_where_a_comparison_cannot_be_written(tmp_path: Path) -> None:
    a, b = write_evaluation(tmp_path / "a", [0, 1]), write_evaluation(tmp_path / "b", [1, 1])
    (tmp_path / "file").write_text("mine")
    for out, said in (("file", "is a file"), ("file/x", "cannot be made")):
        with pytest.raises(RunError, match=said):
            compare.run([str(a), str(b)], str(tmp_path / out))
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_kill_left_half_written_is_no_evaluation(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "out" / ".writing-abc" / "model", [0, 1])
    with pytest.raises(RunError, match="no evaluation here"):
        find_results(str(tmp_path / "out"))
