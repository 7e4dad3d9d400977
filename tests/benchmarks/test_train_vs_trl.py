"""The training benchmark in a tiny form: what a side measures, and the ratio against TRL's best."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.command import write_inputs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_sides
import train_vs_trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--step", "4", "--trl_batch", "3"), "does not divide"),
        (("--pairs", "4"), "one step of 4"),
        (("--trl_both",), "add --full"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: tuple[str, ...], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_vs_trl.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        train_vs_trl.main()
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


def arguments(inputs: Path, *flags: str) -> list[str]:
    tiny = [
        "--pairs",
        "6",
        "--step",
        "2",
        "--dtype",
        "float32",
        "--max_length",
        "96",
        "--max_prompt_length",
        "64",
        "--trl_batch",
        "2",
    ]
    return ["bench", "--model", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl"), *tiny, *flags]


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
def test_all_sides_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    pytest.importorskip("trl")
    write_inputs(tmp_path)
    monkeypatch.setattr(train_sides, "PeakMemory", lambda: _NoMemory())
    losses = []
    sides = [["--child", "preftree"], ["--child", "trl", "--batch", "2"]]
    if full:
        sides = [["--full", *side] for side in (*sides, [*sides[1], "--trl_precompute"])]
    for flags in sides:
        monkeypatch.setattr(sys, "argv", arguments(tmp_path, *flags))
        found = train_sides.run_side(train_vs_trl._arguments())
        seconds = found["seconds"]
        before = seconds["before"] if full and ("--trl_precompute" in flags or "preftree" in flags) else 0.0
        assert found["pairs_per_second"] == pytest.approx(1 / (seconds["later"] / 4 + before / 6))
        assert seconds["whole"] >= seconds["before"] + seconds["first"] + seconds["later"]
        losses.append(found["losses"])
    assert len(losses[0]) == 3
    assert all(losses[0] == pytest.approx(others, abs=1e-4) for others in losses[1:])


def test_arithmetic_is_that_of_the_steps_that_are_timed() -> None:
    pairs = [
        SimpleNamespace(prompt_ids=[0] * prompt, chosen_ids=[0] * chosen, rejected_ids=[0] * rejected, others=())
        for prompt, chosen, rejected in ((100, 50, 50), (10, 2, 3), (20, 4, 5))
    ]
    once, twice = (SimpleNamespace(step=1, epochs=epochs) for epochs in (1, 2))
    own = train_sides._counts(once, pairs, precomputed=False)
    assert (own.tree_tokens, own.scored_tokens) == (10 + 2 + 3 + 20 + 4 + 5, 2 + 3 + 4 + 5)
    assert (own.reference_tokens, own.reference_scored) == (own.tree_tokens, own.scored_tokens)
    share = train_sides._counts(twice, pairs, precomputed=True)
    assert share.tree_tokens == 44 + 244
    assert share.reference_tokens == round(5 / 6 * 244)  # of one pass over all pairs


class _NoMemory:
    """In place of the thread that watches this process, whose memory says nothing here."""

    peak = 0

    def __enter__(self) -> _NoMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def test_the_ratio_is_stated_against_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"preftree": 6.0, "TRL, pairs of 1": 2.0, "TRL, pairs of 2": 3.0, "TRL, pairs of 4": 1.0}

    def fresh(_: list[str], name: str) -> dict[str, Any]:
        return {
            "pairs_per_second": rates[name],
            "whole_pairs_per_second": rates[name] / 2,
            "seconds": {"first": 1.0},
            "peak_gib": 1.0,
            "losses": [0.7, 0.6],
            "gemm_peak_gflops": 100.0,
            "mfu": 0.5,
            "dtype": "float32",
        }

    monkeypatch.setattr(train_vs_trl, "fresh_process", fresh)
    found = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "2", "--json", str(found)])
    assert train_vs_trl.main() == 0
    report = json.loads(found.read_text())
    assert report["best"] == "TRL, pairs of 2"
    assert report["ratios"] == [2.0, 2.0]
    assert report["arguments"]["data"] == "benchmarks/data/orca_pairs.jsonl"  # whoever reads it has another root
    assert "speed against TRL, pairs of 2, TRL's best: min 2.00" in capsys.readouterr().out


def test_both_ways_of_a_reference_are_compared_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    flags = arguments(tmp_path, "--full", "--trl_both", "--rounds", "1")
    children: list[list[str]] = []

    def fresh(command: list[str], name: str) -> dict[str, Any]:
        children.append(command)
        return {
            "pairs_per_second": 1.0, "whole_pairs_per_second": 1.0, "seconds": {"first": 1.0}, "losses": [0.7],
            "peak_gib": {"preftree": 1.0, "TRL, second model, pairs of 2": 2.0}.get(name, 1.25),
            "gemm_peak_gflops": 100.0, "mfu": 0.5, "dtype": "float32",
        }  # fmt: skip

    monkeypatch.setattr(train_vs_trl, "fresh_process", fresh)
    monkeypatch.setattr(sys, "argv", flags)
    assert train_vs_trl.main() == 0
    assert ["--trl_precompute" in command for command in children] == [False, False, True]
    out = capsys.readouterr().out
    assert "memory: 50 % of TRL, second model, pairs of 2, 80 % of TRL, precomputed, pairs of 2" in out
