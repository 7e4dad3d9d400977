"""From prompts and their continuations to token trees.

A `Bundle` is what a batch is made of: one prompt with the continuations that must be scored together (a
preference pair, K ranked answers, the options of a question). `grow` merges the prompts of many bundles into
trees, so that equal prompts, and common prefixes of prompts (a system turn, few-shot examples), occur once, and so
does an answer that several bundles give to one prompt (the best of K, in a pair with each of the others).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

#: Shortest common prefix that is worth a segment of its own. Sharing fewer tokens saves less than the
#: extra segment costs in attention tiles. Equal prompts are merged whatever their length.
MIN_SHARED = 8


@dataclass(frozen=True, slots=True)
class Bundle:
    """One prompt and the continuations that belong together.

    `leaf_ids[i]` is the caller's name for `continuations[i]`; it comes back with its log-prob.
    """

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    leaf_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a bundle needs at least one prompt token: its last token predicts the first answer token")
        if len(self.continuations) != len(self.leaf_ids):
            raise ValueError(f"{len(self.continuations)} continuations but {len(self.leaf_ids)} leaf ids")
        if not all(self.continuations):
            raise ValueError("an empty continuation has no log-prob; drop it before building trees")

    @property
    def size(self) -> int:
        """Tokens of this bundle as a tree of its own."""
        return len(self.prompt) + sum(len(continuation) for continuation in self.continuations)


@dataclass(slots=True)
class Node:
    """A run of tokens, and what follows it. `leaves` are the names of the continuation that it is, none in a prompt."""

    tokens: tuple[int, ...]
    children: list[Node] = field(default_factory=list)
    leaves: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens of the whole subtree."""
        return sum(len(node.tokens) for node in self.walk())

    def walk(self) -> Iterator[Node]:
        """The nodes of the subtree, depth first, parents before children. No recursion: forks may nest deeply."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)


def common_prefix(a: Sequence[int], b: Sequence[int], start: int = 0) -> int:
    """Length of the common prefix of `a` and `b`, given that the first `start` tokens agree."""
    end = min(len(a), len(b))
    if a[start:end] == b[start:end]:
        return end
    return next(i for i in range(start, end) if a[i] != b[i])


def grow(bundles: Sequence[Bundle], min_shared: int = MIN_SHARED) -> list[Node]:
    """Merge bundles into trees: equal prompts always, common prefixes of at least `min_shared` tokens.

    Equal continuations of equal prompts become one leaf with several names. Those that only share a
    prefix stay separate. The result does not depend on the order of `bundles`; the order of equal prompts' leaves does.
    """
    answers: dict[tuple[int, ...], dict[tuple[int, ...], Node]] = {}
    for bundle in bundles:
        leaves = answers.setdefault(bundle.prompt, {})
        for continuation, name in zip(bundle.continuations, bundle.leaf_ids, strict=True):
            leaves.setdefault(continuation, Node(continuation)).leaves += (name,)
    entries = [(prompt, list(leaves.values())) for prompt, leaves in sorted(answers.items(), key=lambda item: item[0])]
    return _branch(entries, min_shared) if entries else []


def _branch(entries: list[tuple[tuple[int, ...], list[Node]]], min_shared: int) -> list[Node]:
    """Trees for sorted (prompt, leaves) entries."""
    trees: list[Node] = []
    # Entries whose first `depth` tokens are equal and laid out already, and where what follows them goes.
    waiting = [(entries, 0, trees)]
    while waiting:
        entries, depth, into = waiting.pop()
        if len(entries) == 1:
            prompt, leaves = entries[0]
            into.append(Node(prompt[depth:], list(leaves)))
            continue
        # Entries are sorted, so what the first and the last have in common, all have in common.
        fork = common_prefix(entries[0][0], entries[-1][0], depth)
        groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], list[Node]]]] = {}
        for entry in entries:
            groups.setdefault(entry[0][fork : fork + 1], []).append(entry)
        if fork - depth >= min_shared:
            trunk = Node(entries[0][0][depth:fork])
            for _, leaves in groups.pop((), []):  # at most one: a prompt that is itself a prefix of others
                trunk.children += leaves
            into.append(trunk)
            depth, into = fork, trunk.children
        waiting += [(group, depth, into) for group in reversed(groups.values())]
    return trees
