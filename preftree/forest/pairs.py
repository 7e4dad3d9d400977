"""Preference pairs as forests: one batch of pairs, cut into forests of at most a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count, islice
from typing import Protocol

import torch

from preftree.forest.balance import balance
from preftree.forest.forest import Forest, Shape
from preftree.forest.pack import pack
from preftree.forest.pad import has_room, pad_forest
from preftree.forest.tree import Bundle


class Pair(Protocol):
    """An encoded preference pair, as `preftree.data.encode` makes them.

    A ranked list is the pair of its best and its worst answer with `others` beside them; `ranks` are those of chosen,
    rejected and other answers, 1 for the best.
    """

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def chosen_ids(self) -> tuple[int, ...]: ...
    @property
    def rejected_ids(self) -> tuple[int, ...]: ...
    @property
    def others(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...


def forests_of_pairs(
    pairs: Sequence[Pair],
    budget: int,
    device: torch.device | str = "cpu",
    shape: Shape | None = None,
    lists: bool = False,
) -> list[Forest]:
    """The forests of a batch. Pair i has the leaves 2i (chosen) and 2i + 1 (rejected), both in one forest.

    An answer that several pairs of a forest have to one prompt is one leaf under the name of each of them.

    Args:
        budget: maximum tokens per forest; a pair that is larger gets a forest of its own.
        shape: pad every forest to it; at least every single pair must fit.
        lists: with the other answers of ranked lists, as `bundles_of_pairs` numbers them.
    """
    bundles = bundles_of_pairs(pairs, lists=lists)
    if shape is None:
        return [Forest.of(group, device) for group in pack(bundles, budget)]
    groups = pack(bundles, min(budget, shape.tokens), fits=partial(has_room, shape))
    return [pad_forest(Forest.of(group), shape).to(device) for group in groups]


def bundles_of_pairs(pairs: Sequence[Pair], *, lists: bool = False) -> list[Bundle]:
    """Each pair as a bundle of two continuations, numbered as `forests_of_pairs` says.

    Args:
        lists: with the other answers of ranked lists, numbered one after another from twice the number of pairs on.
    """
    number = count(2 * len(pairs))
    return [
        Bundle(
            tuple(pair.prompt_ids),
            answers_of(pair) if lists else answers_of(pair)[:2],
            (2 * i, 2 * i + 1, *(islice(number, len(pair.others)) if lists else ())),
        )
        for i, pair in enumerate(pairs)
    ]


def answers_of(pair: Pair) -> tuple[tuple[int, ...], ...]:
    """Chosen, rejected and other answers, in the order of `ranks`."""
    return (tuple(pair.chosen_ids), tuple(pair.rejected_ids), *(tuple(ids) for ids in pair.others))


def pair_size(pair: Pair) -> int:
    """Tokens of a pair with all its answers as a tree of its own."""
    return len(pair.prompt_ids) + sum(map(len, answers_of(pair)))


def shard_pairs(pairs: Sequence[Pair], ranks: int) -> list[list[int]]:
    """The places in `pairs` that each of several ranks takes, each pair once, even in tree tokens (see `balance`)."""
    # With the chosen answer, which all pairs of a prompt share where the best answer is paired with each other one.
    shared = [(*p.prompt_ids, *p.chosen_ids) for p in pairs]
    return balance(shared, [pair_size(pair) for pair in pairs], ranks)
