"""The order of an epoch in which all pairs of a prompt stand together, so that one step computes the prompt once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from preftree.forest import Pair
from preftree.train.dataset import PairDataset


class PromptOrder(Sampler[int]):
    """Prompts shuffled anew each epoch, the pairs of a prompt one after another in their own order.

    The same for the same seed and epoch, whatever the number of ranks. A step has its fixed number of pairs, so
    the pairs of a prompt may still be cut in two where a step ends.
    """

    def __init__(self, pairs: Sequence[Pair], seed: int) -> None:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, pair in enumerate(pairs):
            groups.setdefault(tuple(pair.prompt_ids), []).append(index)
        self._groups = list(groups.values())
        self._seed, self._epoch, self._length = seed, 0, len(pairs)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        groups = self._groups.copy()
        random.Random(f"{self._seed}/{self._epoch}").shuffle(groups)
        return (index for group in groups for index in group)


def prompt_order(data: Any, seed: int) -> PromptOrder | None:
    """Keeps the pairs of a prompt together where the data set asks for it."""
    return PromptOrder(data.pairs, seed) if isinstance(data, PairDataset) and data.by_prompt else None
