"""Preference losses: pure functions of log-probs, one value per pair, with the paper's equation beside each.

π is the policy, r the reference, y_w the chosen and y_l the rejected answer to prompt x. With

    h = log π(y_w|x)/r(y_w|x) − log π(y_l|x)/r(y_l|x)

most losses are a function of β·h. To add one, write the function and its line in `LOSSES`.

Shape suffixes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Summed log-probs of the answers of P pairs, and their lengths in tokens; all of shape (P,).

    In a forest of fixed shape the first `real` of the pairs are real, and `weight_P` is 1 for them and 0 for the
    padding, whose log-probs are 0 and whose lengths are 1.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor
    ref_rejected_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor
    weight_P: Tensor | None = None
    real: int | None = None

    @property
    def pairs(self) -> int:
        """How many pairs there are, padding not counted."""
        return int(self.chosen_P.shape[0]) if self.real is None else self.real

    @property
    def chosen_ratio_P(self) -> Tensor:
        """log π(y_w|x) / r(y_w|x)"""
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        """log π(y_l|x) / r(y_l|x)"""
        return self.rejected_P - self.ref_rejected_P


def sigmoid(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """DPO, −log σ(β h) (arXiv 2305.18290, eq. 7); with label smoothing ε conservative DPO,

    −(1−ε) log σ(β h) − ε log σ(−β h)   (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    scaled_P = beta * (logps.chosen_ratio_P - logps.rejected_ratio_P)
    if not label_smoothing:
        return -F.logsigmoid(scaled_P)
    return -(1 - label_smoothing) * F.logsigmoid(scaled_P) - label_smoothing * F.logsigmoid(-scaled_P)


def ipo(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """IPO, (h̄ − 1/(2β))² (arXiv 2310.12036, eq. 17, β is its τ), h̄ from log-ratios averaged over tokens.

    Summed log-ratios would make the target 1/(2β) mean something else for each answer length; the average
    is what the authors used.
    """
    h_P = logps.chosen_ratio_P / logps.chosen_length_P - logps.rejected_ratio_P / logps.rejected_length_P
    return (h_P - 1 / (2 * beta)) ** 2


def hinge(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """Hinge, max(0, 1 − β h) (SLiC-HF, arXiv 2305.10425, eq. 1, on log-ratios as in RSO, 2309.06657)."""
    return torch.relu(1 - beta * (logps.chosen_ratio_P - logps.rejected_ratio_P))


Loss = Callable[[PairLogps, float, float], Tensor]

LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
}

#: Losses that label smoothing means something for; settings refuse it for the others.
SMOOTHED = frozenset({"sigmoid"})
