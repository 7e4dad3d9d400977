"""The layout of a forest: tokens depth first, and for each token where its subtree ends.

    query q attends key k   ⇔   k ≤ q < subtree_end[k]

is causality, packing and prompt sharing at once. A token's position is its depth on its own path.

Shape suffixes: T tokens of the forest, S scored tokens, L leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from preftree.forest.tree import Bundle, Node, grow

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens without a fork: one `Node` laid out at `[start, end)` of the forest."""

    start: int
    end: int
    parent: int  # index of the parent segment, -1 for a root
    position: int  # path position of the first token
    leaf: int | None  # number of the leaf in layout order, None for a prompt segment


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that every forest of a run is padded to (see `pad`); `answers` is the maximum of one pair or list."""

    tokens: int
    scored: int
    leaves: int
    answers: int = 2

    @property
    def pairs(self) -> int:
        """Pairs, or lists, that there is room for."""
        return self.leaves // self.answers

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.scored} of them scored, {self.leaves} answers"


@dataclass(frozen=True, eq=False)
class Forest:
    """Token trees side by side in one sequence.

    Args:
        input_ids_T: token ids.
        position_ids_T: depth of each token on its root-to-leaf path, from 0.
        subtree_end_T: index one past the last token below each token's segment.
        segments: the runs without a fork, in layout order (parents before children).
        leaf_ids: the caller's names of the leaves, in layout order. A continuation that was given more than once
            for one prompt is one leaf with several names.
        leaf_of_id: for each of `leaf_ids` the number of its leaf.
        predictor_S, target_S, leaf_S: for each scored token the index of the token whose hidden state
            predicts it, its id, and the number of its leaf.
        tokens: the token ids once more, on the host and without padding: nothing has to be read back from a device.
        shape: what the forest is padded to, None if it holds no padding.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    subtree_end_T: Tensor
    segments: tuple[Segment, ...]
    leaf_ids: tuple[int, ...]
    leaf_of_id: tuple[int, ...]
    predictor_S: Tensor
    target_S: Tensor
    leaf_S: Tensor
    tokens: tuple[int, ...]
    shape: Shape | None = None
    _derived: dict[Hashable, Any] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def plant(cls, trees: Sequence[Node], device: torch.device | str = "cpu") -> Forest:
        """Lay out `trees` depth first, one after another."""
        layout = _Layout()
        for tree in trees:
            layout.add(tree)
        return layout.forest().to(device)

    @classmethod
    def of(cls, bundles: Sequence[Bundle], device: torch.device | str = "cpu") -> Forest:
        """Merge `bundles` into trees and lay them out."""
        return cls.plant(grow(bundles), device)

    def to(self, device: torch.device | str) -> Forest:
        """The same forest on another device."""
        device = torch.device(device)
        if device == self.device:
            return self
        names = ("input_ids_T", "position_ids_T", "subtree_end_T", "predictor_S", "target_S", "leaf_S")
        arrays = [getattr(self, name) for name in names]
        # All of it in one piece: every copy to a device costs a wait of its own.
        moved = upload(torch.cat(arrays), device).split([len(array) for array in arrays])
        return replace(self, **dict(zip(names, moved, strict=True)))

    def __len__(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def device(self) -> torch.device:
        return self.input_ids_T.device

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, computed once per forest: masks, tiles and hashes that several layers or passes need.

        Args:
            key: unique among all callers; by convention (who, what it depends on besides the forest).
        """
        if key not in self._derived:
            self._derived[key] = make()
        found: T = self._derived[key]
        return found

    def dense_mask(self, window: int | None = None, chunk: int | None = None) -> Tensor:
        """The specification, (T, T) booleans: may query row q attend key column k?

        With a sliding `window`, only the last `window` tokens of the query's own path, itself included. With a `chunk`,
        only tokens of the query's own chunk, where every path is cut into chunks of that many tokens from its root.
        """
        index_T = torch.arange(len(self), device=self.device)
        q_T1, k_1T = index_T[:, None], index_T[None, :]
        mask_TT = (k_1T <= q_T1) & (q_T1 < self.subtree_end_T[None, :])
        if window is not None:
            mask_TT &= self.position_ids_T[:, None] - self.position_ids_T[None, :] < window
        if chunk is not None:
            chunk_T = self.position_ids_T // chunk
            mask_TT &= chunk_T[:, None] == chunk_T[None, :]
        return mask_TT

    @cached_property
    def depth(self) -> int:
        """Tokens of the longest path."""
        return max((s.position + s.end - s.start for s in self.segments), default=0)

    def ancestors(self, segment: int) -> list[int]:
        """Indices of the segments above `segment`, root first."""
        path: list[int] = []
        above = self.segments[segment].parent
        while above >= 0:
            path.append(above)
            above = self.segments[above].parent
        return path[::-1]

    @cached_property
    def leaf_segments(self) -> tuple[int, ...]:
        """The segment of each leaf, in layout order."""
        return tuple(i for i, segment in enumerate(self.segments) if segment.leaf is not None)

    @cached_property
    def leaf_lengths(self) -> tuple[int, ...]:
        """Scored tokens of each leaf, in layout order."""
        return tuple(self.segments[i].end - self.segments[i].start for i in self.leaf_segments)

    def path_segments(self, segment: int) -> list[Segment]:
        """The segments from the root to `segment`, itself included."""
        return [self.segments[i] for i in (*self.ancestors(segment), segment)]

    def unrolled(self) -> list[Tensor]:
        """Each leaf as a single sequence, path and continuation, in layout order."""
        paths = map(self.path_segments, self.leaf_segments)
        return [torch.cat([self.input_ids_T[part.start : part.end] for part in path]) for path in paths]

    def unrolled_ids(self) -> list[list[int]]:
        """The same from the host's copy of the token ids."""
        paths = map(self.path_segments, self.leaf_segments)
        return [[i for part in path for i in self.tokens[part.start : part.end]] for path in paths]

    @property
    def slots(self) -> int:
        """Leaves there is room for: all of them, or those of the fixed shape."""
        return len(self.leaf_segments) if self.shape is None else self.shape.leaves

    def halves(self) -> tuple[Forest, Forest]:
        """The same answers in two forests, for where one does not fit; prompts between them are computed twice."""
        leaves = [
            Bundle(tuple(ids[:-length]), (tuple(ids[-length:]),), (leaf,))
            for leaf, (ids, length) in enumerate(zip(self.unrolled_ids(), self.leaf_lengths, strict=True))
        ]
        middle = (len(leaves) + 1) // 2
        return Forest.of(leaves[:middle], self.device), Forest.of(leaves[middle:], self.device)

    def sum_by_leaf(self, value_S: Tensor) -> Tensor:
        """The sum of a value over each leaf's scored tokens, (slots,)."""
        with_padding_L = value_S.new_zeros(self.slots + 1).index_add(0, self.leaf_S, value_S)
        return with_padding_L[: self.slots]

    @cached_property
    def unrolled_tokens(self) -> int:
        """Tokens of a single sequence for each name: what is computed without sharing or padding."""
        return sum(self.segments[self.leaf_segments[i]].position + self.leaf_lengths[i] for i in self.leaf_of_id)


class _Layout:
    """Collects a depth-first walk into the arrays of a forest."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self.segments: list[Segment] = []
        self.leaf_ids: list[int] = []
        self.leaf_of_id: list[int] = []
        self.predictors: list[int] = []
        self.leaves: list[int] = []

    def add(self, tree: Node) -> None:
        """Lay out a tree, depth first. No recursion: forks may nest deeply."""
        waiting = [(tree, -1)]
        first = len(self.segments)
        while waiting:
            node, parent = waiting.pop()
            waiting += [(child, len(self.segments)) for child in reversed(node.children)]
            self._add_node(node, parent)
        ends: dict[int, int] = {}  # of the subtree below each segment: children come after their parents
        for index in range(len(self.segments) - 1, first - 1, -1):
            segment = self.segments[index]
            end = max(segment.end, ends.get(index, 0))
            ends[segment.parent] = max(end, ends.get(segment.parent, 0))
            self.ends[segment.start : segment.end] = [end] * (segment.end - segment.start)

    def _add_node(self, node: Node, parent: int) -> None:
        if not node.tokens:
            raise ValueError("a node without tokens")
        above = self.segments[parent] if parent >= 0 else None
        start, end = len(self.ids), len(self.ids) + len(node.tokens)
        position = above.position + above.end - above.start if above else 0
        leaf = None
        if node.leaves:
            if above is None:
                raise ValueError("a leaf needs a prompt above it: nothing predicts its first token")
            leaf = self.leaf_of_id[-1] + 1 if self.leaf_of_id else 0
            self.leaf_ids += node.leaves
            self.leaf_of_id += [leaf] * len(node.leaves)
            self.predictors += [above.end - 1, *range(start, end - 1)]
            self.leaves += [leaf] * len(node.tokens)
        self.segments.append(Segment(start, end, parent, position, leaf))
        self.ids += node.tokens
        self.positions += range(position, position + len(node.tokens))
        self.ends += [0] * len(node.tokens)

    def forest(self) -> Forest:
        targets = [i for s in self.segments if s.leaf is not None for i in self.ids[s.start : s.end]]
        columns = (self.ids, self.positions, self.ends, self.predictors, targets, self.leaves)
        arrays = [torch.tensor(column, dtype=torch.long) for column in columns]
        return Forest(
            input_ids_T=arrays[0],
            position_ids_T=arrays[1],
            subtree_end_T=arrays[2],
            segments=tuple(self.segments),
            leaf_ids=tuple(self.leaf_ids),
            leaf_of_id=tuple(self.leaf_of_id),
            predictor_S=arrays[3],
            target_S=arrays[4],
            leaf_S=arrays[5],
            tokens=tuple(self.ids),
        )


def idle_forest(device: torch.device | str) -> Forest:
    """The smallest forest there is: what a rank scores in a dummy pass, which keeps collectives in step."""
    return Forest.of([Bundle((0,), ((0,),), (0,))], device)


def upload(values: Sequence[float] | Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`, integers as int64; to CUDA without waiting for the work that is queued there."""
    device = torch.device(device)
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=None if values else torch.long)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
