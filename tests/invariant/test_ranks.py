"""Several processes are one: the same steps, losses and adapters at any number of ranks, started by any means."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from preftree.cli import main_train
from tests.command import command, history, losses, write_inputs
from tests.ranks import ROOT, together

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")

#: 22 pairs, 21 to train on: five steps of 4 and one of a single pair, of which the second rank gets none.
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), pairs=26)


def flags(inputs: Path, output: Path, ranks: int, **more: object) -> list[str]:
    """One global batch of 4 pairs, however many ranks there are."""
    settings = {
        "per_device_train_batch_size": 4 // ranks,
        "max_steps": STEPS,
        "save_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 6,
        **more,
    }
    return command(inputs, output, **settings)


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the run on one rank."""
    output = tmp_path_factory.mktemp("alone") / "O"
    assert main_train(flags(inputs, output, 1)) == 0
    return output


def assert_same_run(found: Path, expected: Path) -> None:
    """Losses, what is logged of pairs, and adapters."""
    assert losses(found) == pytest.approx(losses(expected), abs=1e-6)
    for one, other in zip(history(found), history(expected), strict=True):
        for name, value in other.items():
            if name.startswith(("rewards/", "logps/", "eval_loss", "eval_rewards", "eval_logps", "grad_norm", "epoch")):
                assert one[name] == pytest.approx(value, abs=2e-5), name
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    assert max(float(weight.abs().max()) for name, weight in ours.items() if "lora_B" in name) > 1e-3


def test_two_ranks_are_one(inputs: Path, alone: Path, tmp_path: Path) -> None:
    steps = [record["epoch"] for record in history(alone) if "loss" in record]
    assert len(steps) == STEPS
    said = together(flags(inputs, tmp_path / "O", 2), 2, tmp_path)
    assert "ranks      2" in said
    assert_same_run(tmp_path / "O", alone)


def test_mpirun(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """The launcher itself, which sets its own variables and none of torch's."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not here: apt-get install openmpi-bin")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    launch = [sys.executable, "gaudi_spawn.py", "--world_size", "2", "--use_mpi", "dpo_clm.py"]
    done = subprocess.run(
        [*launch, *flags(inputs, tmp_path / "O", 2)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "O", alone)


def test_a_base_model_shared_out_is_the_same_model(inputs: Path, alone: Path, tmp_path: Path) -> None:
    said = together([*flags(inputs, tmp_path / "O", 2, tokens_per_forest=40), "--fsdp"], 2, tmp_path)
    assert "2 LlamaDecoderLayer" in said
    assert_same_run(tmp_path / "O", alone)
