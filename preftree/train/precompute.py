"""All reference log-probs of a run before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console

from preftree.forest import shard_pairs
from preftree.io.progress import Progress
from preftree.train.step import Step


def precompute(step: Step, loaders: Iterable[Iterable[dict[str, Any]]], count: int, console: Console) -> None:
    """Have the reference compute what it does not know yet. All ranks call it together.

    Where attention is not the compiled kernel, an answer's log-prob is rounded differently beside other answers, in
    bfloat16 by tenths of a nat for a whole answer. In the batches of the run's first epoch, policy and reference are
    rounded alike: the first loss is ln 2.

    Args:
        loaders: batches as the first epoch and the evaluations will see them.
        count: pairs of all loaders.
    """
    reference, ranks = step.reference, step.ranks
    assert reference is not None
    progress, done = Progress(console, "reference  ", "pairs"), 0
    with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
        for loader in loaders:
            for batch in loader:
                pairs = batch["pairs"]
                mine = [pairs[place] for place in shard_pairs(pairs, ranks.count)[ranks.index]]
                reference.fill(step.forests(mine))
                done += len(pairs)
                progress(done, count)
