"""What a training step adds for devices that compile for each shape, and for Intel Gaudi.

With fixed shapes every forest runs the same operations on the same shapes. Lazy mode gathers operations until it is
told to run them: after each backward pass and after the optimizer's step. Nothing of the vendor's is imported before
it is asked for. Contract-tested, not hardware-tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from preftree.errors import DeviceError
from preftree.hardware.device import Choice
from preftree.train.config import DPOConfig


class StepHook(TrainerCallback):
    """Called where a step may have to do something for its device.

    Args:
        run_gathered: makes the device run what it has gathered; None where it does so by itself.
        fixed_shapes: keep the operations of all backward passes of a run the same.
    """

    def __init__(self, run_gathered: Callable[[], Any] | None = None, fixed_shapes: bool = False) -> None:
        self.run_gathered, self.fixed_shapes = run_gathered, fixed_shapes

    def before_forests(self, trained: Iterable[nn.Parameter]) -> None:
        """Before the first forest of a step."""
        if self.fixed_shapes:
            # The first backward pass after the step would otherwise store gradients, the others add to them.
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def after_backward(self) -> None:
        """After each forest's backward pass."""
        if self.run_gathered is not None:
            self.run_gathered()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.after_backward()


def step_hook(train: DPOConfig, device: str) -> StepHook:
    """The hook for these settings on this device.

    Raises DeviceError when lazy mode is asked for and the Gaudi stack cannot be imported.
    """
    if not (train.use_lazy_mode and device.startswith("hpu")):
        return StepHook(fixed_shapes=train.pad_max)
    try:
        from habana_frameworks.torch import core
    except ImportError as error:
        raise DeviceError(f"--use_lazy_mode: the Gaudi software cannot be imported ({error})") from error
    return StepHook(core.mark_step, train.pad_max)


def optimizer(args: TrainingArguments, device: str) -> Choice[tuple[Any, dict[str, Any]] | None]:
    """Gaudi's fused AdamW with the arguments of --optim adamw; None leaves the optimizer to Trainer."""
    if not device.startswith("hpu"):
        return Choice(None, "torch's own")
    name = OptimizerNames(args.optim).value
    if not name.startswith("adamw_torch"):
        return Choice(None, f"asked for by --optim {name}")
    try:
        from habana_frameworks.torch.hpex.optimizers import FusedAdamW
    except ImportError:
        return Choice(None, f"{name}: this Gaudi software has no FusedAdamW")
    arguments = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return Choice((FusedAdamW, arguments), "Gaudi's FusedAdamW, one kernel for all weights")
