"""What the training stage refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.errors import DeviceError
from preftree.settings import TrainSettings, parse_settings
from preftree.train.run import train


def test_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients would not be added up, and every rank would train on its own without a word."""
    output = tmp_path / "out"
    settings = parse_settings(
        ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(output), "--use_cpu", "true"]
    )
    monkeypatch.setattr(TrainSettings, "world_size", property(lambda self: 2))
    with pytest.raises(DeviceError, match="one of 2 ranks"):
        train(settings)
    assert not output.exists()
