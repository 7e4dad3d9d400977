"""Cut a batch of bundles into forests that fit a token budget.

A bundle is never torn apart: its loss couples its leaves. A bundle larger than the budget gets a forest of
its own, since there is no smaller way to compute it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from preftree.forest.tree import MIN_SHARED, Bundle, common_prefix


def pack(bundles: Sequence[Bundle], budget: int, min_shared: int = MIN_SHARED) -> list[list[Bundle]]:
    """Groups of bundles, each of at most `budget` tree tokens where that is possible.

    Bundles with a common beginning are kept side by side, so that sharing survives the cut; then the groups
    are put together, largest first, as long as they fit. Depends on the contents of the batch, not its order.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be at least 1, got {budget}")
    runs = _cut_in_order(sorted(bundles, key=lambda b: (b.prompt, b.continuations)), budget, min_shared)
    forests: list[tuple[int, list[Bundle]]] = []
    for size, run in sorted(runs, key=lambda item: -item[0]):
        # Fullest forest that still has room (best fit): leaves the fewest half-empty ones.
        fitting = [i for i, (held, _) in enumerate(forests) if held + size <= budget]
        if fitting:
            best = max(fitting, key=lambda i: forests[i][0])
            forests[best] = (forests[best][0] + size, forests[best][1] + run)
        else:
            forests.append((size, run))
    return [group for _, group in forests]


def _cut_in_order(ordered: Sequence[Bundle], budget: int, min_shared: int) -> list[tuple[int, list[Bundle]]]:
    """Runs of neighbours, each with its tree tokens. A run ends where the budget does or where sharing does."""
    runs: list[tuple[int, list[Bundle]]] = []
    for bundle in ordered:
        shared = 0
        if runs:
            previous = runs[-1][1][-1].prompt
            shared = common_prefix(previous, bundle.prompt)
            # Below the threshold `grow` shares nothing, except between equal prompts.
            if shared < min_shared and previous != bundle.prompt:
                shared = 0
        if shared and runs[-1][0] + bundle.size - shared <= budget:
            size, run = runs[-1]
            run.append(bundle)
            runs[-1] = (size + bundle.size - shared, run)
        else:
            runs.append((bundle.size, [bundle]))
    return runs
