"""What a difference between two models on the same questions is worth.

Both answered the same questions, so the differences are taken question by question: most of what makes a score
uncertain, that some questions are easy, is common to both and cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Resamples of a bootstrap interval; its ends are then good to about a hundredth of its width.
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Other minus base, both as means over questions.

    Args:
        mean, low, high: the difference and its 95 % interval.
        p: probability of a difference at least as large if there were none.
        test: how `p` was had.
        gained, lost: questions that only the other, or only the base, answers rightly; None for graded scores.
    """

    mean: float
    low: float
    high: float
    p: float
    test: str
    gained: int | None = None
    lost: int | None = None


def paired_difference(base_Q: np.ndarray, other_Q: np.ndarray, seed: int = 0) -> Difference:
    """The difference of two scores of one task, of shape (Q,) each, question by question.

    Scores of 0 and 1 get McNemar's exact test (Psychometrika 12, 1947): of the questions that flipped, are as many
    gained as lost? Others (mc2's probabilities) get the bootstrap's. The interval is the paired bootstrap's for both.
    """
    difference_Q = other_Q - base_Q
    low, high, p = bootstrap([difference_Q], seed)
    mean = float(difference_Q.mean())
    if not set(np.unique(np.concatenate([base_Q, other_Q]))) <= {0.0, 1.0}:
        return Difference(mean, low, high, p, "paired bootstrap")
    gained, lost = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    return Difference(mean, low, high, mcnemar(gained, lost), "McNemar exact", gained, lost)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of `gained` against `lost` flips: a fair coin for each question that flipped."""
    from scipy.stats import binomtest  # only `preftree[eval]` brings it, and the bootstrap does without

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def average_difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Difference:
    """The difference of the average over tasks, each task's questions resampled by themselves."""
    differences = [other_Q - base_Q for base_Q, other_Q in pairs]
    low, high, p = bootstrap(differences, seed)
    return Difference(float(np.mean([d.mean() for d in differences])), low, high, p, "paired bootstrap")


def bootstrap(differences: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """95 % percentile interval and two-sided p of the average of means (Efron and Tibshirani 1993, chapters 13, 15).

    A resample's mean depends only on how often each value is drawn, so equal values are drawn together: a task of
    zeros and ones has three distinct differences, however many questions.
    """
    random = np.random.default_rng(seed)
    means_B = np.zeros(RESAMPLES)
    for difference_Q in differences:
        values_V, counts_V = np.unique(difference_Q, return_counts=True)
        count = len(difference_Q)
        for start in range(0, RESAMPLES, 1000):  # (1000, V) at a time
            drawn_BV = random.multinomial(count, counts_V / count, size=1000)
            means_B[start : start + 1000] += drawn_BV @ values_V / count / len(differences)
    low, high = (float(np.quantile(means_B, q)) for q in (0.025, 0.975))
    beyond = min(((means_B <= 0).sum() + 1) / (RESAMPLES + 1), ((means_B >= 0).sum() + 1) / (RESAMPLES + 1))
    return low, high, float(min(1.0, 2 * beyond))
