"""Training on a device that is not the CPU: the same numbers, nothing left behind on the host, and no wait for the
device inside a step. The device is a stand-in (`tests/support/fakes/software_hpu`) in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from preftree.forest import Shape
from preftree.train.losses import PairLogps
from preftree.train.objective import Objective
from preftree.train.trainer import DPOTrainer
from tests.support.ranks import server
from tests.support.training import PAIRS, make_model, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:accelerate.*")

#: Six pairs in steps of three, twice: the reference is known in the last two steps. Two steps to a line of the log.
STEPS = {"per_device_train_batch_size": 3, "max_steps": 4, "logging_steps": 2, "max_grad_norm": 1.0}


class Mixing(Objective):
    """Forgets that there is a device."""

    def losses(self, logps: PairLogps) -> Tensor:
        losses_P = super().losses(logps)
        return losses_P + torch.zeros(len(losses_P))


class Reading(Objective):
    """Reads a number in every step."""

    def losses(self, logps: PairLogps) -> Tensor:
        losses_P = super().losses(logps)
        assert losses_P.sum().item() > 0
        return losses_P


class Choosing(Objective):
    """Makes a shape depend on the numbers."""

    def losses(self, logps: PairLogps) -> Tensor:
        losses_P = super().losses(logps)
        return losses_P[losses_P > 0]


def trainer(folder: Path, device: str, objective: Objective | None = None) -> DPOTrainer:
    """As `--pad_max true` sets it up."""
    model = make_model(dtype=torch.float32).to(device)
    made = make_trainer(
        model,
        folder,
        attention="masked",
        objective=objective,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        **STEPS,
    )
    made.step.budget, made.step.shape, made.hook.fixed_shapes = 96, Shape(tokens=96, scored=40, leaves=12), True
    assert made.args.device.type == made.accelerator.device.type == device
    return made


# --- In the process that has the device ---


def start() -> None:
    """Puts the device in place. Trainer and accelerate look for the vendor's package, or take what they are told."""
    from tests.support.fakes import software_hpu

    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = software_hpu.NAME


class Watch(TrainerCallback):
    """What made the host wait: in each step, and before each step since the one before."""

    def __init__(self) -> None:
        self.inside: list[list[str]] = []
        self.before: list[list[str]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.before.append(_taken())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.inside.append(_taken())


def _taken() -> list[str]:
    from tests.support.fakes.software_hpu import waits

    found = list(waits)
    waits.clear()
    return found


def train(folder: Path) -> tuple[list[dict[str, float]], Watch]:
    run, watch = trainer(folder, "hpu"), Watch()
    run.add_callback(watch)
    run.train()
    assert {p.device.type for p in run.model.parameters()} == {"hpu"}
    return run.state.log_history, watch


def plant(folder: Path, objective: Objective) -> list[str]:
    """What the host waited for in a step with a fault in it.

    Raises:
        RuntimeError: with the device's own words. Its class would bring the device into the process that reads it.
    """
    from tests.support.fakes.software_hpu import MixedDevices

    run = trainer(folder, "hpu", objective)
    run.step.plan(PAIRS)  # the reference is known from here on
    _taken()
    try:
        run.training_step(run.model, {"pairs": PAIRS})
    except MixedDevices as error:
        raise RuntimeError(str(error)) from None
    return _taken()


# --- In the process of the tests ---


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, server(), start) as pool:
        yield pool


def test_training_there_is_training_here(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    found = process.submit(train, tmp_path / "hpu")
    here = trainer(tmp_path / "cpu", "cpu")
    here.train()
    there, watch = found.result()
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "train_loss"):
        expected = [line[name] for line in here.state.log_history if name in line]
        assert [line[name] for line in there if name in line] == pytest.approx(expected, rel=1e-5), name
    # What the reference said is read once, to be kept; the optimizer and the clipping of gradients read nothing.
    assert watch.inside == [["copy to the CPU in fill"], ["copy to the CPU in fill"], [], []]
    # For a line of the log: our metrics in one piece, Trainer's loss and gradient norm.
    lines = sorted(watch.before[2])
    assert [line.partition(" in ")[0] for line in lines] == ["_local_scalar_dense"] * 2 + ["copy to the CPU"]
    assert watch.before[1] == watch.before[3] == []


def test_a_tensor_left_on_the_host_is_an_error(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor: tensors of the CPU and of hpu in one operation"):
        process.submit(plant, tmp_path, Mixing()).result()
    assert "tests.support.fakes.software_hpu" not in sys.modules


@pytest.mark.parametrize(
    ("objective", "waits"),
    [
        (Objective(), []),
        (Reading(), ["_local_scalar_dense in losses"]),
        (Choosing(), ["index in losses", "index_put in torch"]),  # the second one is its backward pass
    ],
    ids=["none", "item", "mask"],
)
def test_a_wait_is_seen(process: ProcessPoolExecutor, tmp_path: Path, objective: Objective, waits: list[str]) -> None:
    assert process.submit(plant, tmp_path, objective).result() == waits
