"""What a difference between two models on the same questions is worth.

Both answered the same questions, so the differences are taken question by question: most of what makes a score
uncertain, that some questions are easy, is common to both and cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

#: Resamples of a bootstrap interval; its ends are then good to about a hundredth of its width.
RESAMPLES = 10_000
#: Standard errors that a true difference must be away from 0 to show at the 5 % level with 80 % probability: 2.80.
_DETECTABLE = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)


@dataclass(frozen=True)
class Difference:
    """Other minus base, both as means over questions.

    Args:
        mean, low, high: the difference and its 95 % interval.
        p: probability of a difference at least as large if there were none.
        test: how `p` was had.
        gained, lost: questions that the other answers rightly more often, or less often; None for graded scores.
        detectable: the smallest true difference that would have shown at the 5 % level with 80 % probability, had its
            questions the spread that was measured; None where nothing differs.
    """

    mean: float
    low: float
    high: float
    p: float
    test: str
    gained: int | None = None
    lost: int | None = None
    detectable: float | None = None


def paired_difference(base_Q: np.ndarray, other_Q: np.ndarray, repeats: int = 1, seed: int = 0) -> Difference:
    """The difference of two scores of one task, of shape (Q,) each, question by question.

    Scores of 0 and 1 get McNemar's exact test (Psychometrika 12, 1947): of the questions that flipped, are as many
    gained as lost? Means of 0 and 1 over several runs get the same test with steps of 1/repeats, `sign_flips`. Others
    (mc2's probabilities) get the bootstrap's p. The interval is the paired bootstrap's for all.

    Args:
        repeats: how many runs of 0 and 1 each score is the mean of. The question stays the unit: runs of one recipe
            answer it alike, so three of them are no three questions.
    """
    difference_Q = other_Q - base_Q
    low, high, p = bootstrap([difference_Q], seed)
    mean, smallest = float(difference_Q.mean()), detectable([difference_Q])
    if not (_are_shares(base_Q, repeats) and _are_shares(other_Q, repeats)):
        return Difference(mean, low, high, p, "paired bootstrap", detectable=smallest)
    step_Q = np.rint(difference_Q * repeats).astype(int)
    gained, lost = int((step_Q > 0).sum()), int((step_Q < 0).sum())
    exact = (mcnemar(gained, lost), "McNemar exact") if repeats == 1 else (sign_flips(step_Q), "sign flips, exact")
    return Difference(mean, low, high, *exact, gained, lost, smallest)


def _are_shares(value_Q: np.ndarray, repeats: int) -> bool:
    """Whether scores are means of `repeats` zeros and ones."""
    counts_Q = value_Q * repeats
    return bool(((value_Q >= 0) & (value_Q <= 1) & (np.abs(counts_Q - np.rint(counts_Q)) < 1e-9)).all())


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of `gained` against `lost` flips: a fair coin for each question that flipped."""
    from scipy.stats import binomtest  # only `preftree[eval]` brings it, and the bootstrap does without

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flips(step_Q: np.ndarray) -> float:
    """Exact two-sided p of a sum of whole steps: as large a sum, if a fair coin gave each step its sign (Fisher's
    randomization test, 1935). With steps of one size this is McNemar's test."""
    sizes = np.abs(step_Q[step_Q != 0])
    chance_S = np.ones(1)  # of each sum from -total to total
    for size in sizes:
        wider_S = np.zeros(len(chance_S) + 2 * size)
        wider_S[: len(chance_S)] += chance_S / 2
        wider_S[2 * size :] += chance_S / 2
        chance_S = wider_S
    total = int(sizes.sum())
    as_large_S = np.abs(np.arange(-total, total + 1)) >= abs(int(step_Q.sum()))
    return float(min(1.0, chance_S[as_large_S].sum()))


def detectable(differences: Sequence[np.ndarray]) -> float | None:
    """The smallest true average of means that a two-sided test at 5 % finds with 80 % probability, by the normal
    approximation and the spread of the measured differences; None where there is no spread to go by."""
    if min(len(difference_Q) for difference_Q in differences) < 2:
        return None
    variance = sum(float(difference_Q.var(ddof=1)) / len(difference_Q) for difference_Q in differences)
    return _DETECTABLE * variance**0.5 / len(differences) if variance > 0 else None


def average_difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Difference:
    """The difference of the average over tasks, each task's questions resampled by themselves."""
    differences = [other_Q - base_Q for base_Q, other_Q in pairs]
    low, high, p = bootstrap(differences, seed)
    mean = float(np.mean([difference_Q.mean() for difference_Q in differences]))
    return Difference(mean, low, high, p, "paired bootstrap", detectable=detectable(differences))


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
