"""What is seen while training: rows in columns, a line that fits, a sparkline, a disk that is too small."""

from __future__ import annotations

import shutil
from collections import namedtuple
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from preftree.errors import RunError
from preftree.train.closing import check_room
from preftree.train.live import LogRows, fitting, sparkline
from tests.support.training import make_model, make_trainer

RECORD = {"rewards/accuracies": 0.75, "rewards/margins": 1.5, "rewards/chosen": 1.0, "rewards/rejected": -0.5}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_rows_are_aligned_and_fit(width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = StringIO()
    rows = LogRows(Console(file=out, width=width, force_terminal=terminal))
    state, control = TrainerState(), TrainerControl()
    state.is_world_process_zero = True
    for step, logs in (
        (5, {"loss": 0.6931, "learning_rate": 1e-5, **RECORD}),
        (10, {"eval_loss": 0.5, **{f"eval_{name}": value for name, value in RECORD.items()}}),
        (10, {"train_runtime": 3.0}),
    ):
        state.global_step = step
        rows.on_log(None, state, control, logs=logs)  # type: ignore[arg-type]
    heading, first, second = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert "\x1b[3" not in out.getvalue()  # no colour
    assert first.split() == ["5", "0.6931", "0.750", "+1.5000", "+1.0000", "-0.5000", "1.00e-05"]
    assert second.split()[:3] == ["eval", "10", "0.5000"]
    for words in ("step", "loss", "accuracy", "margin"):
        assert heading.index(words) + len(words) in {i + 1 for i, mark in enumerate(first) if mark != " "}
    assert max(map(len, (heading, first, second))) <= 79


def test_a_line_takes_what_fits() -> None:
    parts = ["step 1/10", "loss 0.6931", "0:10 left", "x" * 40]
    assert fitting(parts, 80) == "step 1/10  loss 0.6931  0:10 left  " + "x" * 40
    assert fitting(parts, 60) == "step 1/10  loss 0.6931  0:10 left"
    assert fitting(parts, None) == fitting(parts, 200)


def test_a_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan")]) == ""
    assert len(sparkline(list(range(1000)))) == 40


def test_the_disk_is_looked_at_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_model(), tmp_path, save_strategy="steps", save_steps=1, max_steps=50)
    usage = namedtuple("usage", "total used free")
    said: list[str] = []
    weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    for free, refused in ((10, True), (100 * weights, False), (10**12, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: usage(0, 0, free))
        if refused:
            with pytest.raises(RunError, match="too little for one checkpoint"):
                check_room(trainer, said.append)
        else:
            check_room(trainer, said.append)
    assert len(said) == 1
    assert "--save_total_limit" in said[0]
