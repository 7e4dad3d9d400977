"""Demos of several seeds as one result: the prompt is the unit, whatever the number of seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from preftree.demo.average import demo_average
from preftree.demo.rows import read_split
from preftree.demo.run import main
from preftree.errors import RunError
from preftree.evaluate.statistics import sign_flips
from preftree.io.run_folder import RunFolder


def write_demo(place: Path, before: set[int], after: set[int], prompts: int | None = None) -> str:
    """A demo whose prompts of these places passed; an answer of training's own samples comes first."""
    folder = RunFolder(place)
    folder.folder.mkdir(parents=True)
    folder.sample({"question": "Why?", "before": "", "after": ""})
    for row, content in enumerate(read_split("heldout")[:prompts]):
        folder.sample({"question": content["question"], "passed_before": row in before, "passed_after": row in after})
    return str(place)


def test_prompts_are_averaged_over_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fates = [{0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6}, {0, 2, 3, 4, 5, 6, 7, 8, 9}]
    folders = [write_demo(tmp_path / str(seed), {0, 1}, after) for seed, after in enumerate(fates)]
    found = demo_average(folders)
    prompts = len(read_split("heldout"))
    assert (found.before, found.after, found.prompts) == ([2, 2, 2], [8, 7, 9], prompts)
    assert found.difference.mean == pytest.approx((8 - 2) / prompts)
    # In thirds of a prompt: 1 lost, 2 to 6 gained whole, 7 in two seeds, 8 and 9 in one.
    assert found.difference.p == pytest.approx(sign_flips(np.array([-1, 3, 3, 3, 3, 3, 2, 1, 1])))
    assert main(["--average", *folders]) == 0
    said = capsys.readouterr().out
    assert f"after      8.0 of {prompts} held-out prompts pass, 7.9 % (by run: 8, 7, 9)" in said
    assert "8 prompts pass more often than before, 1 less often" in said


def test_what_is_no_demo_is_refused(tmp_path: Path) -> None:
    whole, half = write_demo(tmp_path / "a", set(), set()), write_demo(tmp_path / "b", set(), set(), prompts=3)
    with pytest.raises(RunError, match="b holds no whole demo \\(3 of"):
        demo_average([whole, half])
    with pytest.raises(RunError, match="nothing holds no whole demo"):
        demo_average([str(tmp_path / "nothing")])
    (tmp_path / "a" / "run" / "samples.jsonl").write_text("{\n")
    with pytest.raises(RunError, match="samples are damaged"):
        demo_average([whole])
