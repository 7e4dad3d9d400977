"""`preftree sweep`: eight runs with one tokenization and one reference pass, their table and their report."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch import nn
from typer.testing import CliRunner

from preftree.cli import app
from preftree.config.train import parse_settings
from preftree.data import tokens
from preftree.report.read import read_run
from preftree.sweep.choice import choose
from preftree.train.reference import Reference
from tests.support.command import write_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")
NEEDED = {"model_name_or_path": "M", "dataset_name": "D"}


def write(folder: Path, **changes: Any) -> Path:
    content = {
        "output": str(folder / "sweep"),
        "grid": {"beta": [0.1, 0.5], "learning_rate": [1e-3, 5e-3], "loss_type": ["sigmoid", "ipo"]},
        "train": {
            "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "pairs.jsonl"), "max_steps": 2,
            "per_device_train_batch_size": 5, "validation_split_percentage": 20, "torch_dtype": "float32",
            "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "lora_rank": 2,
        },
        **changes,
    }  # fmt: skip
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def go(path: Path, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sweep", str(path), *flags])
    return result.exit_code, result.output + result.stderr


def weights_in_memory() -> int:
    gc.collect()
    return sum(isinstance(each, nn.Parameter) for each in gc.get_objects())


@pytest.mark.long
def test_eight_runs_one_tokenization_one_reference_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))  # other tests have encoded the same pairs
    grid = write(write_inputs(tmp_path))
    counts: Counter[str] = Counter()
    real_encode, real_remember = tokens.encode_pairs, Reference._remember

    def encode(*args: Any, **more: Any) -> Any:
        counts["tokenizations"] += 1
        return real_encode(*args, **more)

    def remember(self: Reference, key: bytes, token_S: Any) -> None:
        counts["answers"] += key not in self._known
        real_remember(self, key, token_S)

    monkeypatch.setattr(tokens, "encode_pairs", encode)
    monkeypatch.setattr(Reference, "_remember", remember)
    before = weights_in_memory()
    code, said = go(grid)
    assert code == 0, said
    assert weights_in_memory() == before  # no run's model stays
    runs = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert len(runs) == 8
    assert "beta=0.1,lr=0.001,loss=sigmoid" in {path.name for path in runs}
    # 12 pairs: 10 trained on in two steps, and 2 held out.
    assert counts == {"tokenizations": 1, "answers": 24}
    text = (tmp_path / "sweep/sweep.md").read_text("utf-8")
    assert text.count("| beta=") == 8
    assert "Best by held-out accuracy: **beta=" in text
    report = (tmp_path / "sweep/report.html").read_text("utf-8")
    assert report.count("<figcaption>Loss</figcaption>") == 1
    assert all(path.name in report for path in runs)
    learned = {json.dumps(read_run(path).records[-1]["loss"]) for path in runs}
    assert len(learned) > 4  # settings reach the runs

    found = json.loads((tmp_path / "sweep/sweep.json").read_text("utf-8"))
    assert (found["pairs"], len(found["runs"])) == (2, 8)
    best = max(run["held_out"]["accuracy"] for run in found["runs"])
    chosen = next(run for run in found["runs"] if run["name"] == found["chosen"]["name"])
    assert chosen["held_out"]["accuracy"] == best
    assert f"chosen     {chosen['name']}: held-out accuracy {best:.3f}, the highest of 8" in said
    settings = parse_settings([str(tmp_path / "sweep/best.yaml"), "--output_dir", "O", "--seed", "9"])
    assert (settings.train.seed, settings.train.max_steps, settings.train.output_dir) == (9, 2, "O")
    assert f"beta={settings.train.beta},lr={settings.train.learning_rate}" in chosen["name"]

    before = {path: path.stat().st_mtime_ns for path in runs for path in path.glob("adapter_model.safetensors")}
    code, said = go(grid)
    assert (code, said.count("finished   ")) == (0, 8)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_dry_run_shows_the_runs_and_writes_nothing(tmp_path: Path) -> None:
    code, said = go(write(tmp_path), "--dry-run")
    assert code == 0
    assert "8 runs" in said
    assert "beta=0.5,lr=0.005,loss=ipo" in said
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grd": {}}, "grd is no part of a sweep. Did you mean grid?"),
        ({"grid": {}}, "grid is missing"),
        ({"grid": {"beta": 0.1}}, "grid: beta needs a list of values"),
        ({"grid": {"beat": [0.1]}}, "--beat"),
        ({"grid": {"beta": [0.1, -1]}}, "--beta must be above 0"),
        ({"grid": {"max_steps": [1, 2]}}, "train: max_steps is in the grid as well"),
        ({"train": {"output_dir": "x"}}, "train: output_dir is set by the sweep"),
        (
            {"train": {"model_name_or_path": "M", "dataset_name": "D", "validation_split_percentage": 0}},
            "held-out pairs",
        ),
        (
            {"train": {"model_name_or_path": "M", "dataset_name": "D", "reference_cache": False}},
            "reference_cache false",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    code, said = go(write(tmp_path, **changes))
    assert code == 2
    assert message in " ".join(said.split())


def test_a_run_that_fails_does_not_end_the_sweep(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path)
    train = {**yaml.safe_load(write(folder).read_text())["train"], "lora_all_linear": False}
    grid = write(folder, grid={"lora_target_modules": [["q_proj"], ["nothing"]]}, train=train)
    code, said = go(grid)
    assert code == 1
    assert "failed     lora_target_modules=nothing" in said
    assert (tmp_path / "sweep/sweep.md").read_text("utf-8").count("| lora\\_target\\_modules=q\\_proj |") == 1


def measured(name: str, accuracy: float, controlled: float | None) -> Any:
    """A run of which only held-out accuracies are known."""
    evidence = SimpleNamespace(last_evaluation=lambda key: accuracy)
    return SimpleNamespace(
        name=name, evidence=evidence, margins=lambda of: SimpleNamespace(length_controlled_accuracy=controlled)
    )


@pytest.mark.parametrize(
    ("runs", "name", "reason"),
    [
        ([("a", 0.5, 0.9), ("b", 0.6, 0.1)], "b", "held-out accuracy 0.600, the highest of 2"),
        (
            [("a", 0.6, 0.4), ("b", 0.6, 0.7), ("c", 0.6, None), ("d", math.nan, 0.9)],
            "b",
            "held-out accuracy 0.600, the highest of 3; tied with a, c, and first by length-controlled accuracy, 0.700",
        ),
        (
            [("a", 0.6, None), ("b", 0.6, None)],
            "a",
            "held-out accuracy 0.600, the highest of 2; tied in both accuracies with b, later in the grid",
        ),
    ],
)
def test_a_choice_says_why(runs: list[tuple[str, float, float | None]], name: str, reason: str) -> None:
    found = choose([measured(*run) for run in runs])
    assert found is not None
    assert (found.name, found.reason) == (name, reason)


def test_without_held_out_accuracies_nothing_is_chosen() -> None:
    assert choose([measured("a", math.nan, 0.5)]) is None
