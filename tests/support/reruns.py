"""Runs of the real command that are ended somewhere and started again, and what must be the same then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from preftree.cli import main_train
from preftree.train.trainer import DPOTrainer
from tests.support.command import command, history

#: Logged numbers that are times or sizes of the process.
TIMED = ("runtime", "per_second", "mfu", "memory")


def flags(inputs: Path, output: Path, **more: object) -> list[str]:
    """Six steps of 4 pairs, checkpoints at 2, 4 and 6, a log line every 3 steps."""
    return command(inputs, output, **{"max_steps": 6, "logging_steps": 3, **more})


def assert_same_run(found: Path, expected: Path) -> None:
    """To the bit, times aside."""
    name = "adapter_model.safetensors"
    assert (found / name).read_bytes() == (expected / name).read_bytes()
    ours, theirs = (
        [{k: v for k, v in record.items() if not any(word in k for word in TIMED)} for record in history(output)]
        for output in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one == other, {key: (one[key], other.get(key)) for key in one if one[key] != other.get(key)}
    logged = [json.loads(line)["step"] for line in (found / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged == [record["step"] for record in history(found)]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call `act` once, in the step of this number."""
    original, acted = DPOTrainer.training_step, []

    def training_step(self: DPOTrainer, *args: Any, **others: Any) -> Tensor:
        if self.state.global_step == step - 1 and not acted:
            acted.append(step)
            act()
        return original(self, *args, **others)

    monkeypatch.setattr(DPOTrainer, "training_step", training_step)


class Killed(BaseException):
    """Nothing catches it."""


def kill() -> None:
    raise Killed


def interrupted(inputs: Path, output: Path, step: int) -> None:
    """A run that dies in a step."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            main_train(flags(inputs, output))
