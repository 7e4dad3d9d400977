"""Losses that need no reference model, and so no reference pass. Shape suffixes: P pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from preftree.train.losses.logps import LossSettings, PairLogps


def sft(logps: PairLogps, settings: LossSettings) -> Tensor:
    """Next-token loss on the chosen answers, averaged over all their tokens in the step.

    Each pair's share is −log π(y_w|x) over the step's mean length, so that the mean over pairs is the mean over tokens.
    """
    mean_length = logps.mean_chosen_length or logps.chosen_length_P.to(logps.chosen_P.dtype).mean()
    return -logps.all_chosen_P / mean_length


def simpo(logps: PairLogps, settings: LossSettings) -> Tensor:
    """SimPO, −log σ(β log π(y_w|x)/|y_w| − β log π(y_l|x)/|y_l| − γ) (arXiv 2405.14734, eq. 6); γ is simpo_gamma."""
    return -F.logsigmoid(settings.beta * (logps.chosen_mean_P - logps.rejected_mean_P) - settings.simpo_gamma)


def cpo(logps: PairLogps, settings: LossSettings) -> Tensor:
    """CPO, −log σ(β log π(y_w|x) − β log π(y_l|x)) − α log π(y_w|x)/|y_w| (arXiv 2401.08417); α is cpo_alpha.

    The second term is averaged over tokens, as in the authors' code; label smoothing as in conservative DPO.
    """
    scaled_P, epsilon = settings.beta * (logps.chosen_P - logps.rejected_P), settings.label_smoothing
    prefer_P = -(1 - epsilon) * F.logsigmoid(scaled_P) - epsilon * F.logsigmoid(-scaled_P)
    return prefer_P - settings.cpo_alpha * logps.chosen_mean_P


def orpo(logps: PairLogps, settings: LossSettings) -> Tensor:
    """ORPO, −log π(y_w|x)/|y_w| − λ log σ(log odds(y_w|x)/odds(y_l|x)) (arXiv 2403.07691, eq. 6 and 7), λ is beta.

    odds = p / (1 − p) with log p the mean log-prob of an answer's tokens.
    """
    chosen_P, rejected_P = logps.chosen_mean_P, logps.rejected_mean_P
    log_odds_P = chosen_P - rejected_P - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
    return -chosen_P - settings.beta * F.logsigmoid(log_odds_P)


def _log1mexp(log_p: Tensor) -> Tensor:
    """log(1 − p), without cancellation as p nears 1."""
    log_p = torch.clamp(log_p, max=-torch.finfo(log_p.dtype).tiny)
    return torch.log(-torch.expm1(log_p))
