"""Mixed precision of a run: whether passes are autocast, and whether gradients need loss scaling."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

#: Where gradients smaller than this vanish in float16, a loss is scaled up before its backward pass.
_SCALED = torch.float16


@dataclass(frozen=True)
class MixedPrecision:
    """How passes are computed.

    Args:
        weights: dtype of the model's weights.
        autocast_to: dtype that autocast computes in; None without autocast, as the weights say.
        device: kind of device.
        reason: in words.
    """

    weights: torch.dtype
    autocast_to: torch.dtype | None
    device: str
    reason: str

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a pass."""
        if self.autocast_to is None:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.autocast_to)

    def scaler(self, trained: Iterable[nn.Parameter]) -> GradScaler | None:
        """A loss scaler where gradients pass through float16: unscaled, a third of LoRA's would underflow to 0.

        Trained weights that are float16 themselves cannot have one: their gradients would be unscaled in float16.
        """
        if self.computes_in != _SCALED or any(parameter.dtype == _SCALED for parameter in trained):
            return None
        return GradScaler(self.device)

    @property
    def computes_in(self) -> torch.dtype:
        return self.autocast_to or self.weights


def mixed_precision(weights: torch.dtype, *, bf16: bool, fp16: bool, device: str) -> MixedPrecision:
    """What --bf16 and --fp16 mean for weights of this dtype: autocast over float32, nothing over half precision."""
    asked = torch.bfloat16 if bf16 else torch.float16 if fp16 else None
    if weights != torch.float32 or asked is None:
        return MixedPrecision(weights, None, device, f"{_name(weights)} throughout")
    return MixedPrecision(weights, asked, device, f"float32 weights, autocast to {_name(asked)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
