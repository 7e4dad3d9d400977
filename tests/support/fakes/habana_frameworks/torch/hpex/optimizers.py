"""The fused optimizer: torch's, with the arguments that the real one takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from habana_frameworks.torch import calls


class FusedAdamW(torch.optim.AdamW):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ) -> None:
        assert bias_correction
        calls["FusedAdamW"] += 1
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
