"""Preference pairs as forests: one batch of pairs, cut into forests of at most a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from preftree.forest.balance import balance
from preftree.forest.forest import Forest, Shape
from preftree.forest.pack import pack
from preftree.forest.pad import has_room, pad_forest
from preftree.forest.tree import Bundle


class Pair(Protocol):
    """An encoded preference pair, as `preftree.data.encode` makes them."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def chosen_ids(self) -> tuple[int, ...]: ...
    @property
    def rejected_ids(self) -> tuple[int, ...]: ...


def forests_of_pairs(
    pairs: Sequence[Pair], budget: int, device: torch.device | str = "cpu", shape: Shape | None = None
) -> list[Forest]:
    """The forests of a batch. Pair i has the leaves 2i (chosen) and 2i + 1 (rejected), both in one forest.

    An answer that several pairs of a forest have to one prompt is one leaf under the name of each of them.

    Args:
        budget: maximum tokens per forest; a pair that is larger gets a forest of its own.
        shape: pad every forest to it; at least every single pair must fit.
    """
    bundles = bundles_of_pairs(pairs)
    if shape is None:
        return [Forest.of(group, device) for group in pack(bundles, budget)]
    groups = pack(bundles, min(budget, shape.tokens), fits=partial(has_room, shape))
    return [pad_forest(Forest.of(group), shape).to(device) for group in groups]


def bundles_of_pairs(pairs: Sequence[Pair]) -> list[Bundle]:
    """Each pair as a bundle of two continuations, numbered as `forests_of_pairs` says."""
    return [
        Bundle(tuple(p.prompt_ids), (tuple(p.chosen_ids), tuple(p.rejected_ids)), (2 * i, 2 * i + 1))
        for i, p in enumerate(pairs)
    ]


def shard_pairs(pairs: Sequence[Pair], ranks: int) -> list[list[int]]:
    """The places in `pairs` that each of several ranks takes, each pair once, even in tree tokens (see `balance`)."""
    # With the chosen answer, which all pairs of a prompt share where the best answer is paired with each other one.
    shared = [(*p.prompt_ids, *p.chosen_ids) for p in pairs]
    sizes = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs]
    return balance(shared, sizes, ranks)
