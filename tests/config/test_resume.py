"""`--resume RUN` repeats the run's own command; everything else means what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preftree.config.train import parse_settings

BASE = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that began by overwriting another one."""
    folder = tmp_path / "run1"
    settings = parse_settings([*BASE, str(folder), "--beta", "0.3", "--overwrite_output_dir", "--max_steps", "7"])
    (folder / "run").mkdir(parents=True)
    (folder / "checkpoint-4").mkdir()
    content = {"fingerprint": settings.fingerprint(), "settings": settings.as_dict()}
    (folder / "run" / "config.json").write_text(json.dumps(content, default=str))
    return folder


def test_a_run_by_its_folder(run: Path) -> None:
    settings = parse_settings(["--resume", str(run)])
    assert settings.fingerprint() == json.loads((run / "run" / "config.json").read_text())["fingerprint"]
    assert (settings.train.output_dir, settings.train.beta, settings.train.max_steps) == (str(run), 0.3, 7)
    assert settings.train.overwrite_output_dir is False
    assert str(settings.train.resume_from_checkpoint).lower() == "false"


def test_a_run_by_one_of_its_checkpoints(run: Path) -> None:
    settings = parse_settings(["--resume", str(run / "checkpoint-4")])
    assert (settings.train.output_dir, settings.train.beta) == (str(run), 0.3)
    assert settings.train.resume_from_checkpoint == str(run / "checkpoint-4")


def test_flags_beside_it_count(run: Path) -> None:
    assert parse_settings(["--resume", str(run), "--logging_steps", "3"]).train.logging_steps == 3


def test_a_checkpoint_for_another_folder_is_only_a_checkpoint(run: Path) -> None:
    settings = parse_settings([*BASE, "other", "--resume", str(run / "checkpoint-4")])
    assert (settings.train.output_dir, settings.train.beta) == ("other", 0.1)
