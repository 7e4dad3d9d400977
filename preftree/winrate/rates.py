"""From verdicts to a win rate: a tie counts half, the interval is the bootstrap's, and length is taken out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preftree.evaluate.statistics import bootstrap

#: Weight of the prior that keeps a fit finite where one side wins everything; one prompt's worth of a tie.
_RIDGE = 1.0
_RESAMPLES = 500


@dataclass(frozen=True)
class WinRate:
    """A against B.

    Args:
        rate, low, high: share of prompts that A wins, ties counted half, with its 95 % interval.
        controlled, controlled_low, controlled_high: the share at answers of equal length (arXiv 2404.04475).
    """

    prompts: int
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    controlled: float
    controlled_low: float
    controlled_high: float


def win_rate(share_Q: np.ndarray, length_a_Q: np.ndarray, length_b_Q: np.ndarray, seed: int = 0) -> WinRate:
    """The win rate of A.

    Args:
        share_Q: A's share of each prompt: 1, 0.5 or 0.
        length_a_Q, length_b_Q: lengths of the answers, in tokens.
    """
    low, high, _ = bootstrap([share_Q - 0.5], seed)
    excess_Q = length_a_Q - length_b_Q
    spread = float(excess_Q.std())
    length_Q = np.tanh(excess_Q / spread) if spread > 0 else np.zeros(len(excess_Q))
    random = np.random.default_rng(seed)
    count = len(share_Q)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    fits = [_at_equal_length(share_Q, length_Q, weight_Q) for weight_Q in drawn]
    return WinRate(
        prompts=count,
        wins=int((share_Q == 1).sum()),
        ties=int((share_Q == 0.5).sum()),
        losses=int((share_Q == 0).sum()),
        rate=float(share_Q.mean()),
        low=0.5 + low,
        high=0.5 + high,
        controlled=_at_equal_length(share_Q, length_Q, np.ones(count)),
        controlled_low=float(np.quantile(fits, 0.025)),
        controlled_high=float(np.quantile(fits, 0.975)),
    )


def _at_equal_length(share_Q: np.ndarray, length_Q: np.ndarray, weight_Q: np.ndarray) -> float:
    """Win rate at a length difference of 0 by a logistic model of share on length, fitted by Newton's method."""
    design = np.stack([np.ones_like(length_Q), length_Q], axis=1)
    fit = np.zeros(2)
    ridge = np.diag([1e-3, _RIDGE])  # the length's effect is held back where there is little data
    for _ in range(30):
        p_Q = 1 / (1 + np.exp(-np.clip(design @ fit, -30, 30)))
        gradient = design.T @ (weight_Q * (share_Q - p_Q)) - ridge @ fit
        hessian = (design * (weight_Q * p_Q * (1 - p_Q))[:, None]).T @ design + ridge
        step = np.linalg.solve(hessian, gradient)
        fit += np.clip(step, -2, 2)
        if float(np.abs(step).max()) < 1e-9:
            break
    return float(1 / (1 + np.exp(-fit[0])))
