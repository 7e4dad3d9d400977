"""Shard the bundles of one step across ranks: equal work, and bundles with a common prompt stay together.

The slowest rank sets the pace, so what counts is the largest shard. Everything here depends on the contents of the
batch alone, so that every rank finds the same shards without communication.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

from preftree.forest.tree import common_prefix


def balance(prompts: Sequence[tuple[int, ...]], sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of the bundles of each of `parts` ranks, in ascending order; a rank's list may be empty.

    Largest first to the rank with the least so far (LPT, Graham 1969: at most 4/3 of the best possible). What is
    assigned is not single bundles but runs of bundles that save at least half of their tokens in one tree, as long as
    a run is not larger than the average shard.

    Args:
        prompts: the part of each bundle that several bundles may share.
        sizes: tokens of each bundle, prompt and answers.
        parts: number of ranks.
    """
    if parts == 1:
        return [list(range(len(prompts)))]
    loads = [(0, part) for part in range(parts)]
    shards: list[list[int]] = [[] for _ in range(parts)]
    for tokens, run in sorted(_runs(prompts, sizes, parts), key=lambda item: (-item[0], item[1])):
        load, part = heapq.heappop(loads)
        shards[part] += run
        heapq.heappush(loads, (load + tokens, part))
    return [sorted(shard) for shard in shards]


def _runs(prompts: Sequence[tuple[int, ...]], sizes: Sequence[int], parts: int) -> list[tuple[int, list[int]]]:
    """Neighbours in the order of their prompts that belong together, each run with its tree tokens."""
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i], sizes[i], i))
    shared = [0] + [common_prefix(prompts[a], prompts[b]) for a, b in pairwise(order)]
    fair = sum(sizes[i] - common for i, common in zip(order, shared, strict=True)) / parts
    runs: list[tuple[int, list[int]]] = []
    for i, common in zip(order, shared, strict=True):
        alone = sizes[i]
        if runs and 2 * common >= alone and runs[-1][0] + alone - common <= fair:
            runs[-1] = (runs[-1][0] + alone - common, [*runs[-1][1], i])
        else:
            runs.append((alone, [i]))
    return runs
