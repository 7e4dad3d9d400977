"""Random batches with every shape that a forest can take, for Hypothesis and for loops over seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from preftree.forest import Bundle, Forest, Node

_KINDS = ("fresh", "equal", "beginning", "branch", "longer")


def _related(kind: str, other: tuple[int, ...], cut: int, fresh: tuple[int, ...]) -> tuple[int, ...]:
    """A prompt that has something to do with another one (or nothing)."""
    return {
        "fresh": fresh,
        "equal": other,
        "beginning": other[:cut],
        "branch": other[:cut] + fresh,
        "longer": other + fresh,
    }[kind]


@st.composite
def batches(
    draw: st.DrawFn, *, max_bundles: int = 5, vocabulary: int = 4, longest: int = 20, answers: int = 3
) -> list[Bundle]:
    """Bundles with equal prompts, beginnings shared above and below `MIN_SHARED` tokens, prompts that begin
    other prompts, and one-token answers. Few token ids, so that prompts also meet by accident."""
    token = st.integers(0, vocabulary - 1)
    prompts: list[tuple[int, ...]] = []
    continuations: list[tuple[tuple[int, ...], ...]] = []
    for _ in range(draw(st.integers(1, max_bundles))):
        kind = draw(st.sampled_from(_KINDS)) if prompts else "fresh"
        other = draw(st.sampled_from(prompts)) if prompts else (0,)
        fresh = tuple(draw(st.lists(token, min_size=1, max_size=longest)))
        cut = draw(st.integers(1, len(other)))
        prompts.append(_related(kind, other, cut, fresh))
        answer = st.lists(token, min_size=1, max_size=5).map(tuple)
        continuations.append(tuple(draw(st.lists(answer, min_size=1, max_size=answers))))
    names = draw(st.permutations(range(sum(map(len, continuations)))))  # not the order of the layout
    return _named(prompts, continuations, names)


def random_batch(
    seed: int, *, bundles: int = 5, vocabulary: int = 97, longest: int = 20, answers: int = 3, answer: int = 6
) -> list[Bundle]:
    """The same shapes from a seed, where one example is too expensive to be shrunk."""
    rng = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(rng.randint(1, most)))

    prompts = [ids(longest)]
    for index in range(1, bundles):
        other = rng.choice(prompts)
        # In turn, so that every kind occurs whatever the seed.
        prompts.append(_related(_KINDS[index % len(_KINDS)], other, rng.randint(1, len(other)), ids(longest)))
    continuations = [tuple(ids(answer) for _ in range(rng.randint(1, answers))) for _ in prompts]
    names = list(range(sum(map(len, continuations))))
    rng.shuffle(names)
    return _named(prompts, continuations, names)


def _named(
    prompts: Sequence[tuple[int, ...]],
    continuations: Sequence[tuple[tuple[int, ...], ...]],
    names: Sequence[int],
) -> list[Bundle]:
    supply = iter(names)
    return [
        Bundle(prompt, answers, tuple(next(supply) for _ in answers))
        for prompt, answers in zip(prompts, continuations, strict=True)
    ]


def sequences(bundles: Sequence[Bundle]) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and continuation under each leaf's name: what a forest must stand for."""
    return {
        name: (bundle.prompt, answer)
        for bundle in bundles
        for name, answer in zip(bundle.leaf_ids, bundle.continuations, strict=True)
    }


def token_parents(trees: Sequence[Node]) -> list[int]:
    """For each token in depth-first order the token before it on its path, -1 for a tree's first."""
    parents: list[int] = []

    def visit(node: Node, above: int) -> None:
        for _ in node.tokens:
            parents.append(above)
            above = len(parents) - 1
        for child in node.children:
            visit(child, above)

    for tree in trees:
        visit(tree, -1)
    return parents


def path_to(parents: Sequence[int], token: int) -> list[int]:
    """The indices on the way from a tree's first token to `token`, by walking up one at a time."""
    path = [token]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def leaf_paths(forest: Forest) -> Iterator[Tensor]:
    """Indices into the forest of each leaf's whole sequence, in the order of `leaf_ids`."""
    for leaf in forest.leaf_segments:
        spans = [forest.segments[i] for i in (*forest.ancestors(leaf), leaf)]
        yield torch.cat([torch.arange(span.start, span.end) for span in spans])
