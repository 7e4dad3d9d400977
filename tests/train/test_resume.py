"""The real command, ended in every way and started again: it goes on to the same bits, or says why it does not."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftree.cli import main_train
from preftree.io.run_folder import RunFolder
from preftree.train import resume
from preftree.train.checkpoint import seal
from preftree.train.trainer import DPOTrainer
from tests.support.reruns import Killed, assert_same_run, at_step, flags, interrupted, kill

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


# --- The same command again ----------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4], ids=["before the first checkpoint", "between two checkpoints"])
def test_the_same_command_goes_on(inputs: Path, whole: Path, tmp_path: Path, step: int) -> None:
    interrupted(inputs, tmp_path / "O", step)
    assert main_train(flags(inputs, tmp_path / "O")) == 0
    assert_same_run(tmp_path / "O", whole)


def test_killed_between_the_last_checkpoint_and_the_end(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """No step is left to compute, and the mean loss of the run is still that of its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPOTrainer, "_finalize_training", lambda *args: kill())
        with pytest.raises(Killed):
            main_train(flags(inputs, tmp_path / "O"))
    assert main_train(flags(inputs, tmp_path / "O")) == 0
    assert_same_run(tmp_path / "O", whole)


def test_a_finished_run_is_not_computed_again(
    inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "O")
    before = (tmp_path / "O" / "adapter_model.safetensors").stat().st_mtime_ns
    again = flags(inputs, tmp_path / "O")
    assert main_train(again) == 0
    assert "all 6 steps of it; nothing was computed" in capsys.readouterr().out
    assert (tmp_path / "O" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert_same_run(tmp_path / "O", whole)


def test_the_flag_without_a_checkpoint_starts(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """So that one command serves the first start and every restart of an unattended machine."""
    assert main_train(flags(inputs, tmp_path / "O", resume_from_checkpoint="true")) == 0
    assert_same_run(tmp_path / "O", whole)


def test_a_damaged_checkpoint_is_skipped(
    inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(inputs, tmp_path / "O", 5)
    (tmp_path / "O" / "checkpoint-4" / "optimizer.pt").unlink()
    assert main_train(flags(inputs, tmp_path / "O")) == 0
    said = capsys.readouterr().out
    assert "checkpoint-4: optimizer.pt is missing" in said
    assert f"resume     from {tmp_path / 'O' / 'checkpoint-2'}" in said
    assert_same_run(tmp_path / "O", whole)


def test_damaged_records_of_the_report_stop_no_run(inputs: Path, whole: Path, tmp_path: Path) -> None:
    interrupted(inputs, tmp_path / "O", 5)
    for name in ("metrics.jsonl", "pairs.jsonl"):
        (tmp_path / "O" / "run" / name).write_bytes(b"\xff\x00 garbage\n{")
    assert main_train(flags(inputs, tmp_path / "O")) == 0
    assert_same_run(tmp_path / "O", whole)


def test_a_checkpoint_of_another_version(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sealed as it should be, with other sums in it."""
    interrupted(inputs, tmp_path / "O", 5)
    newest = tmp_path / "O" / "checkpoint-4"
    (newest / "progress.json").write_text('{"step_loss": 0.1}')
    seal(newest, 4)
    assert main_train(flags(inputs, tmp_path / "O")) == 2
    error = capsys.readouterr().err
    assert "progress.json lacks last_logged" in error
    assert "another version of preftree" in error


def test_other_micro_batches_are_the_same_run(inputs: Path, whole: Path, tmp_path: Path) -> None:
    interrupted(inputs, tmp_path / "O", 4)
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3}
    assert main_train(flags(inputs, tmp_path / "O", **more)) == 0
    assert_same_run(tmp_path / "O", whole)


# --- Another run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"beta": 0.3}, ["--beta was 0.1, now 0.3"], id="objective"),
        pytest.param({"per_device_train_batch_size": 2}, ["pairs per step was 4, now 2"], id="batch"),
        pytest.param({"lora_rank": 2, "seed": 3}, ["--lora_rank was 4, now 2", "--seed was 1, now 3"], id="several"),
    ],
)
def test_another_run_is_refused_with_all_differences(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], words: list[str]
) -> None:
    interrupted(inputs, tmp_path / "O", 4)
    capsys.readouterr()
    assert main_train(flags(inputs, tmp_path / "O", **change)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_other_data_under_the_same_name(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(inputs, tmp_path / "inputs")
    interrupted(tmp_path / "inputs", tmp_path / "O", 4)
    rows = (tmp_path / "inputs" / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "inputs" / "pairs.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    assert main_train(flags(tmp_path / "inputs", tmp_path / "O")) == 2
    assert "training pairs was" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_in_another_folder(
    inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"resume_from_checkpoint": whole / "checkpoint-4"}
    assert main_train(flags(inputs, tmp_path / "other", beta=0.3, **asked)) == 2
    assert "--beta was 0.1, now 0.3" in capsys.readouterr().err
    assert main_train(flags(inputs, tmp_path / "same", **asked)) == 0
    assert_same_run(tmp_path / "same", whole)


def test_a_second_run_in_one_folder_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(tmp_path / "O").held():
        assert main_train(flags(inputs, tmp_path / "O")) == 2
    said = capsys.readouterr()
    assert f"Another process is working in {tmp_path / 'O'}" in said.err
    assert "model " not in said.out  # before anything slow


# --- Signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(
    inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        assert main_train(flags(inputs, tmp_path / "O")) == 128 + number
    said = capsys.readouterr()
    assert f"{number.name}: finishing this step, then saving" in said.out
    assert "stopped after step 3; checkpoint-3" in said.err
    assert signal.getsignal(number) is before
    assert main_train(flags(inputs, tmp_path / "O")) == 0
    assert_same_run(tmp_path / "O", whole)


# --- Numbers and disks ---------------------------------------------------------------------------


def test_divergence_ends_the_run_and_spoils_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_steps": 1}
    assert main_train(flags(inputs, tmp_path / "O", **more)) == 2
    said = capsys.readouterr()
    assert "Training has diverged" in said.err
    assert "Lower --learning_rate" in said.err
    assert f"{inputs / 'pairs.jsonl'}" in said.out  # the rows of the skipped steps
    assert not (tmp_path / "O" / "adapter_model.safetensors").exists()
    for saved in (tmp_path / "O").rglob("adapter_model.safetensors"):
        assert all(bool(torch.isfinite(weight).all()) for weight in load_file(saved).values())


def test_a_full_disk_costs_a_checkpoint(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = resume.write_json

    def full(path: Path, content: object) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, content)

    monkeypatch.setattr(resume, "write_json", full)
    assert main_train(flags(inputs, tmp_path / "O")) == 0
    assert "checkpoint-4 could not be written ([Errno 28] No space left on device)" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "O").glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert_same_run(tmp_path / "O", whole)
