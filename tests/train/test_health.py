"""Warnings while training: said once, in the step in which they begin, by the functions of the report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from preftree.health.findings import diagnose
from preftree.report.read import read_run
from preftree.train.health import HealthWatch
from preftree.train.live import LiveLine
from tests.support.faults import train_with, write_model
from tests.support.training import PAIRS, make_model, make_trainer, pair

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


def test_a_warning_is_said_once_and_stands_in_the_live_line(tmp_path: Path) -> None:
    biased = [pair(row, (3 + row, 4), range(10, 30), (40 + row % 9, 2)) for row in range(48)]
    trainer = make_trainer(make_model(), tmp_path, biased, max_steps=3)
    said: list[str] = []
    (watch,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, HealthWatch))
    watch.say = said.append
    trainer.train()
    warnings = [line for line in said if line.startswith("WARNING") and "Length explains the preferences" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("WARNING    step 1: ")
    assert "length_bias" in trainer.live_metrics.warnings
    line = LiveLine(Console(file=io.StringIO()), trainer.live_metrics, "cpu", lambda speed: 0.1).line(trainer.state)
    assert "! length bias" in line.plain


def test_a_run_without_a_finding_says_nothing(tmp_path: Path) -> None:
    ended = [each for each in PAIRS if each.chosen_ids[-1] == 2]
    trainer = make_trainer(make_model(), tmp_path, ended, max_steps=2, learning_rate=1e-4)
    (watch,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, HealthWatch))
    said: list[str] = []
    watch.say = said.append
    trainer.train()
    assert said == []


def test_the_report_finds_what_was_said_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model", steps=2)
    view = read_run(train_with("chosen three times longer", 1, tmp_path / "model", tmp_path / "fault"))
    assert "length_bias" in [found.key for found in diagnose(view.evidence)]
    assert "Length explains the preferences" in capsys.readouterr().out
