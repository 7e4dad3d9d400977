"""Shares of a step: every bundle once, even shares, and shared prompts kept together where that is fair."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.forest import Bundle, grow
from preftree.forest.balance import balance
from tests.support.strategies import batches


def shares(bundles: list[Bundle], parts: int) -> list[list[int]]:
    return balance([b.prompt for b in bundles], [b.size for b in bundles], parts)


def tokens(bundles: list[Bundle], share: list[int]) -> int:
    return sum(tree.size for tree in grow([bundles[i] for i in share]))


@settings(deadline=None)
@given(batches(max_bundles=8), st.integers(1, 5))
def test_every_bundle_is_in_one_share(bundles: list[Bundle], parts: int) -> None:
    found = shares(bundles, parts)
    assert len(found) == parts
    assert sorted(i for share in found for i in share) == list(range(len(bundles)))
    assert all(share == sorted(share) for share in found)
    assert found == shares(bundles, parts)
    if len(bundles) >= parts == 2:
        assert all(found)


@settings(deadline=None)
@given(batches(max_bundles=8), st.integers(2, 4))
def test_the_largest_share_is_bounded(bundles: list[Bundle], parts: int) -> None:
    """Greedy dealing ends at most one run above the mean, and a run is one bundle or at most a fair share."""
    alone = [sum(bundles[i].size for i in share) for share in shares(bundles, parts)]
    heaviest = max(tokens(bundles, share) for share in shares(bundles, parts))
    assert heaviest <= sum(alone) / parts + max(sum(alone) / parts, *(b.size for b in bundles))


def test_real_lengths_come_out_even() -> None:
    """Eight pairs a rank with log-normal lengths: the busiest of eight ranks has a few per cent more."""
    rng = random.Random(0)
    uneven = []
    for _ in range(20):
        sizes = [round(rng.lognormvariate(6, 0.6)) for _ in range(64)]
        prompts = [(i, 0, 0, 0) for i in range(64)]
        loads = [sum(sizes[i] for i in share) for share in balance(prompts, sizes, 8)]
        in_turn = [sum(sizes[part::8]) for part in range(8)]
        uneven.append((8 * max(loads) / sum(sizes) - 1, 8 * max(in_turn) / sum(sizes) - 1))
    mean = [sum(column) / len(column) for column in zip(*uneven, strict=True)]
    assert mean[0] < 0.02
    assert mean[1] > 0.2  # dealt in turn: what a sampler for each rank would do


def bundle(prompt: tuple[int, ...], name: int) -> Bundle:
    return Bundle(prompt, ((100 + name,), (200 + name,)), (2 * name, 2 * name + 1))


def test_equal_prompts_stay_together() -> None:
    long, other = tuple(range(40)), tuple(range(50, 90))
    found = shares([bundle(long, 0), bundle(other, 1), bundle(long, 2), bundle(other, 3)], 2)
    assert sorted(found) == [[0, 2], [1, 3]]


def test_but_not_at_the_price_of_an_idle_rank() -> None:
    long = tuple(range(40))
    found = shares([bundle(long, i) for i in range(4)], 2)
    assert all(found)


def test_more_ranks_than_bundles() -> None:
    found = shares([bundle((1, 2, 3), 0), bundle((4, 5, 6), 1)], 4)
    assert sorted(map(len, found)) == [0, 0, 1, 1]
