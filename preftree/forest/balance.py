"""Share the sequences of one step out to several ranks: equal work, and prompts that are shared stay together.

The slowest rank sets the pace, so what counts is the largest share. Everything here depends on the contents of
the batch alone, so that every rank finds the same shares without asking the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

from preftree.forest.tree import common_prefix


def balance(prompts: Sequence[tuple[int, ...]], sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of bundles for each of `parts` ranks, in rising order; ranks may go without.

    Largest first onto the rank with the least (LPT, Graham 1969: at most 4/3 of the best possible). What is dealt
    is not single bundles but runs of bundles that save at least half of their tokens beside each other, as long as
    a run is no more than a fair share.

    Args:
        prompts: of each bundle what a tree may hold once for several of them.
        sizes: tokens of each bundle, prompt and answers.
        parts: number of ranks.
    """
    if parts == 1:
        return [list(range(len(prompts)))]
    loads = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for tokens, run in sorted(_runs(prompts, sizes, parts), key=lambda item: (-item[0], item[1])):
        load, part = heapq.heappop(loads)
        shares[part] += run
        heapq.heappush(loads, (load + tokens, part))
    return [sorted(share) for share in shares]


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
