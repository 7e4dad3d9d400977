"""Losses of one pair against a reference: pure functions, one value per pair, the paper's equation beside each.

π is the policy, r the reference, y_w the chosen and y_l the rejected answer to prompt x. With

    h = log π(y_w|x)/r(y_w|x) − log π(y_l|x)/r(y_l|x)        (under an f-divergence its f′ in place of log)

most of them are functions of β·h. Shape suffixes: P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from preftree.train.losses.divergences import scores
from preftree.train.losses.logps import LossSettings, PairLogps


def _h(logps: PairLogps, settings: LossSettings) -> Tensor:
    chosen_P, rejected_P = scores(logps, settings)
    return chosen_P - rejected_P


def _mean_h(logps: PairLogps, settings: LossSettings) -> Tensor:
    """h from log-ratios averaged over the tokens of each answer."""
    chosen_P, rejected_P = scores(logps, settings)
    return chosen_P / logps.chosen_length_P - rejected_P / logps.rejected_length_P


def _smoothed(scaled_P: Tensor, epsilon: float) -> Tensor:
    """−(1−ε) log σ(z) − ε log σ(−z)"""
    if not epsilon:
        return -F.logsigmoid(scaled_P)
    return -(1 - epsilon) * F.logsigmoid(scaled_P) - epsilon * F.logsigmoid(-scaled_P)


def sigmoid(logps: PairLogps, settings: LossSettings) -> Tensor:
    """DPO, −log σ(β h) (arXiv 2305.18290, eq. 7); with label smoothing ε conservative DPO,

    −(1−ε) log σ(β h) − ε log σ(−β h)   (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    return _smoothed(settings.beta * _h(logps, settings), settings.label_smoothing)


def sigmoid_norm(logps: PairLogps, settings: LossSettings) -> Tensor:
    """Length-normalised DPO, −log σ(β h̄) (Tulu 3, arXiv 2411.15124), h̄ from log-ratios averaged over tokens."""
    return -F.logsigmoid(settings.beta * _mean_h(logps, settings))


def hinge(logps: PairLogps, settings: LossSettings) -> Tensor:
    """Hinge, max(0, 1 − β h) (SLiC-HF, arXiv 2305.10425, eq. 1, on log-ratios as in RSO, 2309.06657)."""
    return torch.relu(1 - settings.beta * _h(logps, settings))


def ipo(logps: PairLogps, settings: LossSettings) -> Tensor:
    """IPO, (h̄ − 1/(2β))² (arXiv 2310.12036, eq. 17, β is its τ), h̄ from log-ratios averaged over tokens.

    Summed log-ratios would make the target 1/(2β) mean something else for each answer length; the average
    is what the authors used.
    """
    return (_mean_h(logps, settings) - 1 / (2 * settings.beta)) ** 2


def exo_pair(logps: PairLogps, settings: LossSettings) -> Tensor:
    """EXO, KL of (σ(β h), σ(−β h)) from (1−ε, ε) (arXiv 2402.00856, eq. 16); ε is label_smoothing, above 0."""
    scaled_P, epsilon = settings.beta * _h(logps, settings), settings.label_smoothing
    chosen_P = torch.sigmoid(scaled_P) * (F.logsigmoid(scaled_P) - math.log1p(-epsilon))
    return chosen_P + torch.sigmoid(-scaled_P) * (F.logsigmoid(-scaled_P) - math.log(epsilon))


def robust(logps: PairLogps, settings: LossSettings) -> Tensor:
    """Robust DPO, (−(1−ε) log σ(β h) + ε log σ(−β h)) / (1 − 2ε) (arXiv 2403.00409): unbiased when a share ε
    (label_smoothing) of the labels is flipped."""
    scaled_P, epsilon = settings.beta * _h(logps, settings), settings.label_smoothing
    return (-(1 - epsilon) * F.logsigmoid(scaled_P) + epsilon * F.logsigmoid(-scaled_P)) / (1 - 2 * epsilon)


def discopop(logps: PairLogps, settings: LossSettings) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414, eq. 5): with z = β h and m = σ(z/τ)

    (1 − m) (−log σ(z)) + m e^(−z)
    """
    scaled_P = settings.beta * _h(logps, settings)
    mix_P = torch.sigmoid(scaled_P / settings.discopop_tau)
    return -F.logsigmoid(scaled_P) * (1 - mix_P) + torch.exp(-scaled_P) * mix_P


def nca_pair(logps: PairLogps, settings: LossSettings) -> Tensor:
    """NCA for pairs, −log σ(a) − ½ log σ(−a) − ½ log σ(−b) with a, b = β log π/r of y_w, y_l (arXiv 2402.05369)."""
    chosen_P, rejected_P = settings.beta * logps.chosen_ratio_P, settings.beta * logps.rejected_ratio_P
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def bco_pair(logps: PairLogps, settings: LossSettings) -> Tensor:
    """BCO for pairs, −log σ(β log π/r(y_w)) − log σ(−β log π/r(y_l)) (arXiv 2404.04656, its reward shift 0)."""
    return -F.logsigmoid(settings.beta * logps.chosen_ratio_P) - F.logsigmoid(-settings.beta * logps.rejected_ratio_P)


def sppo_hard(logps: PairLogps, settings: LossSettings) -> Tensor:
    """SPPO with hard labels, (log π/r(y_w) − 1/(2β))² + (log π/r(y_l) + 1/(2β))² (arXiv 2405.00675, eq. 4.7)."""
    target = 0.5 / settings.beta
    return (logps.chosen_ratio_P - target) ** 2 + (logps.rejected_ratio_P + target) ** 2


def apo_zero(logps: PairLogps, settings: LossSettings) -> Tensor:
    """APO-zero, 1 − σ(β log π/r(y_w)) + σ(β log π/r(y_l)) (arXiv 2408.06266, eq. 7): chosen up, rejected down."""
    chosen_P = torch.sigmoid(settings.beta * logps.chosen_ratio_P)
    return 1 - chosen_P + torch.sigmoid(settings.beta * logps.rejected_ratio_P)


def apo_down(logps: PairLogps, settings: LossSettings) -> Tensor:
    """APO-down, σ(β log π/r(y_w)) + 1 − σ(β h) (arXiv 2408.06266, eq. 8): both down, the rejected one more."""
    apart_P = torch.sigmoid(settings.beta * (logps.chosen_ratio_P - logps.rejected_ratio_P))
    return torch.sigmoid(settings.beta * logps.chosen_ratio_P) + 1 - apart_P


def dpop(logps: PairLogps, settings: LossSettings) -> Tensor:
    """DPO-positive, −log σ(β (h − λ max(0, log r/π(y_w)))) (arXiv 2402.13228): the chosen answer does not become
    less likely than under the reference; λ is dpop_lambda."""
    penalty_P = torch.relu(-logps.chosen_ratio_P)
    h_P = logps.chosen_ratio_P - logps.rejected_ratio_P
    return -F.logsigmoid(settings.beta * (h_P - settings.dpop_lambda * penalty_P))


def rpo(logps: PairLogps, settings: LossSettings) -> Tensor:
    """DPO with a length-normalised NLL term, −log σ(β h) − α log π(y_w|x)/|y_w| (Iterative RPO, arXiv 2404.19733);
    α is rpo_alpha."""
    h_P = logps.chosen_ratio_P - logps.rejected_ratio_P
    return _smoothed(settings.beta * h_P, settings.label_smoothing) - settings.rpo_alpha * logps.chosen_mean_P


def rdpo(logps: PairLogps, settings: LossSettings) -> Tensor:
    """Length-regularised DPO, −log σ(β h + α |y_w| − α |y_l|) (R-DPO, arXiv 2403.19159); α is rdpo_alpha."""
    h_P = logps.chosen_ratio_P - logps.rejected_ratio_P
    longer_P = (logps.chosen_length_P - logps.rejected_length_P).to(h_P.dtype)
    return _smoothed(settings.beta * h_P + settings.rdpo_alpha * longer_P, settings.label_smoothing)
