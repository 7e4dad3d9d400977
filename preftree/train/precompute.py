"""All reference log-probs of a run before its first step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from preftree.forest import Pair, shard_pairs
from preftree.io.progress import Progress
from preftree.train.step import Step

#: Pairs whose forests are planted at a time, per rank.
CHUNK = 256


def precompute(step: Step, pairs: Sequence[Pair], console: Console) -> None:
    """Have the reference compute what it does not know yet of `pairs`. All ranks call it together."""
    reference, ranks = step.reference, step.ranks
    assert reference is not None
    progress = Progress(console, "reference  ", "pairs")
    ordered = sorted(pairs, key=lambda pair: pair.prompt_ids)  # equal prompts share a forest
    chunk = CHUNK * ranks.count
    for start in range(0, len(ordered), chunk):
        part = ordered[start : start + chunk]
        mine = [part[place] for place in shard_pairs(part, ranks.count)[ranks.index]]
        reference.fill(step.forests(mine))
        progress(min(start + chunk, len(ordered)), len(ordered))
