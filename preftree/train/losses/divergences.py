"""f-divergences between policy and reference (Wang et al., "Beyond Reverse KL", arXiv 2309.16240, table 1).

Under an f-divergence the implicit reward is β f′(u) + const with u = π(y|x)/r(y|x); the reverse KL of DPO has
f′(u) = log u + 1. The constant cancels in differences of rewards, so only losses built on such differences take one.
Every function below gets log u and returns f′(u) up to that constant, with f′(1) = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from preftree.train.losses.logps import LossSettings, PairLogps

#: Largest exponent: e⁸⁰ is still finite in float32.
MAX_EXPONENT = 80.0


def reverse_kl(log_u: Tensor, settings: LossSettings) -> Tensor:
    """f′(u) = log u"""
    return log_u


def forward_kl(log_u: Tensor, settings: LossSettings) -> Tensor:
    """f′(u) = 1 − 1/u"""
    return 1 - torch.exp(-log_u)


def js_divergence(log_u: Tensor, settings: LossSettings) -> Tensor:
    """f′(u) = log(2u / (1 + u))"""
    return math.log(2) + F.logsigmoid(log_u)


def alpha_divergence(log_u: Tensor, settings: LossSettings) -> Tensor:
    """f′(u) = (u^(α−1) − 1) / (α − 1), in the limit α → 1 log u."""
    power = settings.f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:
        return log_u
    return (torch.exp(torch.clamp(power * log_u, max=MAX_EXPONENT)) - 1) / power


DIVERGENCES: dict[str, Callable[[Tensor, LossSettings], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def scores(logps: PairLogps, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """f′(π/r) of the chosen and of the rejected answers, (P,) each: log-ratios for the reverse KL."""
    f_prime = DIVERGENCES[settings.f_divergence_type]
    return f_prime(logps.chosen_ratio_P, settings), f_prime(logps.rejected_ratio_P, settings)
