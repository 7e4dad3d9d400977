"""A loss of K ranked answers to one prompt. Shape suffixes: P lists, K answers (i and j among them)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from preftree.train.losses.divergences import DIVERGENCES
from preftree.train.losses.logps import LossSettings, PairLogps


def listwise(logps: PairLogps, settings: LossSettings) -> Tensor:
    """DPO under the Plackett–Luce model (arXiv 2305.18290, appendix A.3, eq. 20): with s_i = β log π(y_i|x)/r(y_i|x)

    −Σ_i log( exp s_i / (exp s_i + Σ_{j worse than i} exp s_j) )

    Every answer is the first among itself and those that are ranked worse. Answers of equal rank are not compared with
    each other; without ties the product is the probability of the whole ranking. For two answers it is `sigmoid`.
    """
    policy_PK, reference_PK, rank_PK = ranked(logps)
    f_prime = DIVERGENCES[settings.f_divergence_type]
    ratio_PK = f_prime(policy_PK - reference_PK, settings)
    apart_PKK = settings.beta * (ratio_PK[:, None, :] - ratio_PK[:, :, None])  # s_j − s_i
    lowest = (
        torch.finfo(apart_PKK.dtype).min / 2
    )  # with −∞ an answer without a worse one would have NaN as its gradient
    worse_PKK = torch.where(is_worse(rank_PK), apart_PKK, lowest)
    return -F.logsigmoid(-worse_PKK.logsumexp(-1)).sum(-1)


def ranked(logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of policy and reference and the ranks of all answers, (P, K) each; of a pair of its two."""
    if logps.policy_PK is not None and logps.reference_PK is not None and logps.rank_PK is not None:
        return logps.policy_PK, logps.reference_PK, logps.rank_PK
    policy_PK = torch.stack([logps.chosen_P, logps.rejected_P], dim=1)
    reference_PK = torch.stack([logps.ref_chosen_P, logps.ref_rejected_P], dim=1)
    return policy_PK, reference_PK, torch.tensor([[1, 2]], device=policy_PK.device).expand(len(policy_PK), 2)


def is_worse(rank_PK: Tensor) -> Tensor:
    """Is answer j ranked worse than answer i? (P, K, K); rank 0 is no answer."""
    rank_i, rank_j = rank_PK[:, :, None], rank_PK[:, None, :]
    return (rank_i > 0) & (rank_j > rank_i)
