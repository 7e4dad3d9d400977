"""The answers of ranked lists as tables, which losses of lists see. Shape suffixes: P pairs or lists, K answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from preftree.forest import Forest, Pair, bundles_of_pairs, upload


@dataclass(frozen=True)
class RankedNames:
    """What the answers of some pairs are called in forests, and how they are ranked.

    Args:
        names: of each pair's answers.
        ranks: of the same.
        width: K, the maximum number of answers of a list in the whole step.
    """

    names: list[tuple[int, ...]]
    ranks: list[tuple[int, ...]]
    width: int

    @classmethod
    def of(cls, pairs: Sequence[Pair], width: int) -> RankedNames:
        """Of the pairs that `forests_of_pairs` was given."""
        names = [bundle.leaf_ids for bundle in bundles_of_pairs(pairs, lists=True)]
        return cls(names, [tuple(pair.ranks) for pair in pairs], width)

    @property
    def pair_names(self) -> int:
        """The names below it are those of chosen and rejected answers."""
        return 2 * len(self.names)

    def table(self, forest: Forest, pairs: Sequence[int], slots: int) -> RankedTable:
        """Where the answers of a forest's lists are in it.

        Args:
            pairs: the forest's pairs, by their number.
            slots: rows of the table; those beyond the pairs are padding.
        """
        leaf_of_name = dict(zip(forest.leaf_ids, forest.leaf_of_id, strict=True))
        leaves: list[int] = []
        ranks: list[int] = []
        for number in pairs:
            absent = [0] * (self.width - len(self.names[number]))
            leaves += [leaf_of_name[name] for name in self.names[number]] + absent
            ranks += [*self.ranks[number], *absent]
        padding = [0] * (self.width * (slots - len(pairs)))
        both = upload([*leaves, *padding, *ranks, *padding], forest.device)
        leaf_N, rank_N = both.split(len(both) // 2)
        return RankedTable(leaf_N, rank_N.view(slots, self.width))

    def leaves(self, forest: Forest, pairs: Sequence[int]) -> list[list[int]]:
        """The leaves of each list of a forest."""
        leaf_of_name = dict(zip(forest.leaf_ids, forest.leaf_of_id, strict=True))
        return [[leaf_of_name[name] for name in self.names[number]] for number in pairs]


@dataclass(frozen=True, eq=False)
class RankedTable:
    """The leaf of each answer, (P · K,), and its rank, (P, K): 1 for the best, 0 where a list has fewer answers."""

    leaf_N: Tensor
    rank_PK: Tensor

    def values(self, value_L: Tensor) -> Tensor:
        """A value of leaves as a table, (P, K)."""
        return value_L.index_select(0, self.leaf_N).view(self.rank_PK.shape)
