"""Two Gaudi cards in lazy mode, as far as that goes without one: the real command on a stand-in for the vendor's
software (`tests/support/fakes`), through transformers' and accelerate's own code for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from preftree.cli import main_train
from preftree.config.train import parse_settings
from tests.support.command import command, history, losses, write_inputs
from tests.support.ranks import ROOT, free_port

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")

STEPS = 6
#: 10 pairs to train on: steps of 4, 4 and 2 pairs.
FLAGS = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 2, "validation_split_percentage": 8}
GAUDI = "--use_habana --use_lazy_mode --use_hpu_graphs_for_training --pad_max true"


@pytest.mark.long
def test_two_cards_in_lazy_mode_are_one_cpu(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    assert main_train(command(inputs, tmp_path / "cpu", **FLAGS)) == 0
    words = command(inputs, tmp_path / "hpu", **FLAGS, per_device_train_batch_size=2, use_cpu="false")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'tests' / 'support' / 'fakes'}{os.pathsep}{ROOT}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PREFTREE_CACHE": str(tmp_path / "cache"),
        "FAKE_HABANA_LOG": str(tmp_path / "calls"),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "dpo_clm.py", *words, *GAUDI.split()],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    for piece in (
        "device     hpu:",
        "ranks      2",
        "attention  masked",
        "shape      ",
        "optimizer  Gaudi's FusedAdamW",
    ):
        assert piece in said[0]

    assert losses(tmp_path / "hpu") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-5)
    for one, other in zip(history(tmp_path / "hpu"), history(tmp_path / "cpu"), strict=True):
        for name in ("rewards/margins", "logps/chosen", "eval_loss", "grad_norm"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-4), name
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("hpu", "cpu"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-4

    for rank in range(2):
        calls = json.loads((tmp_path / f"calls.{rank}").read_text())
        assert calls["mark_step"] == 2 * STEPS  # one forest and one optimizer step a step
        assert calls["FusedAdamW"] == 1
        assert calls["hccl groups"] >= 1  # what accelerate asks for under MULTI_HPU


@pytest.mark.parametrize(
    ("flags", "piece"),
    [
        ("--use_habana --pad_max true", None),
        ("--use_habana", "without --pad_max true: the device compiles for each forest's own shape"),
        ("--pad_max true", "here it only costs time"),
        ("--use_habana --pad_max true --use_lazy_mode", "no longer develops lazy mode"),
        ("--use_habana --pad_max true --use_lazy_mode --use_hpu_graphs_for_training", "for_training: changes nothing"),
    ],
)
def test_words_about_the_flags(flags: str, piece: str | None) -> None:
    base = "--model_name_or_path M --dataset_name D --output_dir O"
    notes = [note for note in parse_settings([*base.split(), *flags.split()]).notes if note.startswith("--")]
    assert (notes == []) if piece is None else any(piece in note for note in notes)
