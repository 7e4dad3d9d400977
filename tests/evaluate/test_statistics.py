"""Paired tests against enumeration and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from preftree.evaluate.statistics import (
    average_difference,
    bootstrap,
    detectable,
    mcnemar,
    paired_difference,
    sign_flips,
)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 9)])
def test_mcnemar_is_the_fair_coins_of_the_flips(gained: int, lost: int) -> None:
    flips = gained + lost
    outcomes = [sum(coins) for coins in product((0, 1), repeat=flips)]
    as_extreme = sum(abs(o - flips / 2) >= abs(gained - flips / 2) for o in outcomes)
    assert mcnemar(gained, lost) == pytest.approx(as_extreme / 2**flips)


def test_a_difference_counts_flips_both_ways() -> None:
    base, other = np.array([0, 0, 1, 1, 1, 0.0]), np.array([1, 1, 0, 1, 1, 0.0])
    found = paired_difference(base, other)
    assert (found.gained, found.lost, found.test) == (2, 1, "McNemar exact")
    assert found.mean == pytest.approx(1 / 6)
    assert found.p == 1.0
    assert found.low < found.mean < found.high


def test_equal_runs_differ_by_nothing() -> None:
    scores = np.random.default_rng(0).random(40)
    found = paired_difference(scores, scores)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert (found.test, found.gained) == ("paired bootstrap", None)


def test_the_bootstrap_is_that_of_resampled_questions() -> None:
    random = np.random.default_rng(1)
    differences = [np.round(random.normal(0.1, 1, size=60), 1), random.choice([-1.0, 0, 1], size=35)]
    means = [np.mean([random.choice(d, size=len(d)).mean() for d in differences]) for _ in range(8000)]
    low, high, p = bootstrap(differences)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert p == pytest.approx(2 * min(np.mean(np.array(means) <= 0), np.mean(np.array(means) >= 0)), abs=0.03)


def test_intervals_cover_the_truth() -> None:
    random, hits = np.random.default_rng(2), 0
    for _ in range(200):
        low, high, _ = bootstrap([random.choice([-1.0, 0, 1], size=150, p=[0.1, 0.75, 0.15])])
        hits += low <= 0.05 <= high
    assert 181 <= hits <= 199  # 95 % of 200, within three standard errors


def test_pairing_pays() -> None:
    """Questions of very uneven difficulty: apart, the two scores' errors would hide the difference."""
    random = np.random.default_rng(3)
    base = random.choice([0.1, 0.9], size=100)
    found = paired_difference(base, base + random.normal(0.03, 0.05, size=100))
    assert found.low > 0
    assert found.p < 0.001


def test_the_average_is_of_tasks_not_of_questions() -> None:
    pairs = [(np.zeros(10), np.ones(10)), (np.zeros(90), np.zeros(90))]
    assert average_difference(pairs).mean == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [(), (1,), (3, -1, 2), (1, 1, -1, 1, 0), (2, 2, -3, 1, 1, -1)])
def test_sign_flips_are_all_signs_counted(steps: tuple[int, ...]) -> None:
    sizes = [abs(step) for step in steps if step]
    sums = [
        sum(s * size for s, size in zip(signs, sizes, strict=True)) for signs in product((-1, 1), repeat=len(sizes))
    ]
    as_large = sum(abs(total) >= abs(sum(steps)) for total in sums)
    assert sign_flips(np.array(steps, int)) == pytest.approx(as_large / len(sums))


def test_sign_flips_of_whole_questions_are_mcnemars() -> None:
    assert sign_flips(np.repeat([1, 0, -1], [14, 50, 6])) == pytest.approx(mcnemar(14, 6))
    assert sign_flips(3 * np.repeat([1, -1], [14, 6])) == pytest.approx(mcnemar(14, 6))


def test_means_of_runs_are_tested_in_steps() -> None:
    base = np.array([0, 0, 1, 1, 0, 1.0])
    other = np.array([[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 1.0], [1, 0, 1, 0, 1, 1]]).mean(0)
    found = paired_difference(base, other, repeats=3)
    assert (found.gained, found.lost, found.test) == (3, 1, "sign flips, exact")
    assert found.p == pytest.approx(sign_flips(np.array([3, 1, 1, -2])))
    # The same numbers are no means of two runs, and probabilities are no means of zeros and ones at all.
    assert paired_difference(base, other, repeats=2).test == "paired bootstrap"
    assert paired_difference(base * 0.5, other, repeats=3).test == "paired bootstrap"


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    random, questions, found = np.random.default_rng(4), 400, 0
    noise = random.choice([-1.0, 0, 1], size=questions, p=[0.1, 0.8, 0.1])
    smallest = detectable([noise])
    assert smallest is not None
    gained = 0.1 + smallest / 2
    for _ in range(300):
        drawn = random.choice([-1, 0, 1], size=questions, p=[0.2 - gained, 0.8, gained])
        found += mcnemar(int((drawn > 0).sum()), int((drawn < 0).sum())) < 0.05
    assert 0.70 < found / 300 < 0.87  # McNemar's exact test is a little conservative
    assert detectable([noise, noise]) == pytest.approx(smallest / 2**0.5)
    assert detectable([np.zeros(9)]) is None
    assert detectable([noise[:1]]) is None
