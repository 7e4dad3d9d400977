"""Losses that couple the pairs of a step: they see all of them, on all ranks, at once. Shape suffixes: P pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from preftree.train.losses.logps import LossSettings, PairLogps


def aot(logps: PairLogps, settings: LossSettings) -> Tensor:
    """AOT on pairs (arXiv 2406.05882, algorithm 1): DPO's loss between the sorted margins of policy and reference,

    z = β (sort(log π(y_w)/π(y_l)) − sort(log r(y_w)/r(y_l))), −(1−ε) log σ(z) − ε log σ(−z)
    """
    policy_P = (logps.chosen_P - logps.rejected_P).sort().values
    reference_P = (logps.ref_chosen_P - logps.ref_rejected_P).sort().values
    return _smoothed(settings.beta * (policy_P - reference_P), settings.label_smoothing)


def aot_unpaired(logps: PairLogps, settings: LossSettings) -> Tensor:
    """AOT on unpaired answers (arXiv 2406.05882, algorithm 1): DPO's loss between sorted log-ratios,

    z = β (sort(log π/r(y_w)) − sort(log π/r(y_l)))
    """
    apart_P = logps.chosen_ratio_P.sort().values - logps.rejected_ratio_P.sort().values
    return _smoothed(settings.beta * apart_P, settings.label_smoothing)


def _smoothed(scaled_P: Tensor, epsilon: float) -> Tensor:
    return -(1 - epsilon) * F.logsigmoid(scaled_P) - epsilon * F.logsigmoid(-scaled_P)
