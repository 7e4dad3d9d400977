"""Cut a batch of bundles into forests that fit a token budget.

A bundle is never torn apart: its loss couples its leaves. A bundle larger than the budget gets a forest of
its own, since there is no smaller way to compute it exactly.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence

from preftree.forest.tree import MIN_SHARED, Bundle, common_prefix, grow


def pack(
    bundles: Sequence[Bundle],
    budget: int,
    min_shared: int = MIN_SHARED,
    fits: Callable[[Sequence[Bundle]], bool] = lambda group: True,
) -> list[list[Bundle]]:
    """Groups of bundles, each of at most `budget` tree tokens, and such that `fits` is true, where that is possible.

    Bundles with a common prefix are kept together, so that sharing survives the cut; then the groups are merged,
    largest first, as long as they fit. Depends on the contents of the batch, not its order.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be at least 1, got {budget}")

    def measure(group: Sequence[Bundle]) -> int | None:
        """Tree tokens of a group, None if it does not fit."""
        size = _tree_tokens(group, min_shared)
        return size if size <= budget and fits(group) else None

    runs = _cut_in_order(sorted(bundles, key=lambda b: (b.prompt, b.continuations)), measure, min_shared)
    forests: list[list[Bundle]] = []
    held: list[tuple[int, int]] = []  # (tokens, −index) of each forest, ascending
    for size, run in sorted(runs, key=lambda item: -item[0]):
        # Fullest forest that still has room (best fit): leaves the fewest half-empty ones.
        for place in range(bisect_right(held, (budget - size, 1)) - 1, -1, -1):
            index = -held[place][1]
            together = forests[index] + run
            # Grown, not added up: a run that forks an earlier trunk can cost that trunk its sharing.
            if (grown := measure(together)) is not None:
                del held[place]
                forests[index] = together
                insort(held, (grown, -index))
                break
        else:
            insort(held, (size, -len(forests)))
            forests.append(run)
    return forests


def _cut_in_order(
    ordered: Sequence[Bundle], measure: Callable[[Sequence[Bundle]], int | None], min_shared: int
) -> list[tuple[int, list[Bundle]]]:
    """Runs of neighbours, each with its tree tokens; a run ends where the budget or the sharing does."""
    runs: list[tuple[int, list[Bundle]]] = []
    start = 0
    while start < len(ordered):
        size, count = _longest_run(ordered, start, measure, min_shared)
        runs.append((size, list(ordered[start : start + count])))
        start += count
    return runs


def _longest_run(
    ordered: Sequence[Bundle], start: int, measure: Callable[[Sequence[Bundle]], int | None], min_shared: int
) -> tuple[int, int]:
    """Tree tokens and number of the bundles from `start` on that share and fit.

    What neighbours share may fork inside the threshold for the run as a whole, so runs are grown, not added up. A
    longer run never has fewer tokens: lengths are tried by doubling, then by halves.
    """
    size, fits, fails = ordered[start].size, 1, None
    linked = 1  # bundles from `start` on, each of which shares with the one before it
    while fails is None or fails - fits > 1:
        wanted = 2 * fits if fails is None else (fits + fails) // 2
        while linked < wanted:
            following = start + linked
            if following == len(ordered) or not _shares(
                ordered[following - 1].prompt, ordered[following].prompt, min_shared
            ):
                fails = linked + 1
                break
            linked += 1
        wanted = min(wanted, linked)
        if wanted == fits:
            break
        if (grown := measure(ordered[start : start + wanted])) is None:
            fails = wanted
        else:
            size, fits = grown, wanted
    return size, fits


def _shares(a: tuple[int, ...], b: tuple[int, ...], min_shared: int) -> bool:
    """Would `grow` merge anything of two prompts? Below the threshold only equal prompts are merged."""
    return a == b or common_prefix(a, b) >= min_shared


def _tree_tokens(bundles: Sequence[Bundle], min_shared: int) -> int:
    return sum(tree.size for tree in grow(bundles, min_shared))
