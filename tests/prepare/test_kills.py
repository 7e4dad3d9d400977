"""Killed at any moment and started again, a run ends with the bytes of an unharmed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.command import TEMPLATE
from tests.support.prepare import rows, write


def driver(out: Path, *flags: str, timeout: float) -> str:
    """In a process of its own: a fork of this one could hang in what other tests have started."""
    command = [sys.executable, "-m", "tests.support.kills", "--out", str(out), *flags]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_three_kills(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.llama(num_hidden_layers=2).save_pretrained(model)
    tiny.word_tokenizer(TEMPLATE).save_pretrained(model)
    source = write(tmp_path / "source.jsonl", rows(60))
    flags = ["--dataset_name", str(source), "--model_name_or_path", str(model), "--num_samples", "30", "--use_cpu"]
    flags += ["--max_new_tokens", "8", "--cut_answers", "keep", "--batch_size", "4", "--num_rejected", "2"]
    said = driver(tmp_path / "out", "--kills", "3", "--", *flags, timeout=300)
    assert said.count("killed after") == 3
    assert "equal, byte for byte" in said


@pytest.mark.kill
def test_the_bundled_model_killed_five_times(tmp_path: Path, samples: Path, smollm2_folder: Path) -> None:
    said = driver(tmp_path / "out", timeout=3600)
    print(said)
    assert said.count("killed after") == 5
    assert "equal, byte for byte" in said
