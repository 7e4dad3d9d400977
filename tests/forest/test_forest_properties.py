"""Random batches: a forest must say what its bundles said, found by walking and not by arithmetic."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.forest import Bundle, Forest, Node, grow, pack
from preftree.forest.tree import MIN_SHARED
from tests.support.strategies import batches, leaf_paths, path_to, sequences, token_parents

few = settings(max_examples=40, deadline=None, derandomize=True)
thresholds = st.sampled_from((1, 3, MIN_SHARED, 10**9))


def trie_size(bundles: list[Bundle]) -> int:
    """Nodes of the trie of all prompts, plus the tokens of all answers."""
    prefixes = {bundle.prompt[: n + 1] for bundle in bundles for n in range(len(bundle.prompt))}
    return len(prefixes) + answer_tokens(bundles)


def answer_tokens(bundles: list[Bundle]) -> int:
    """Tokens of all different answers of each prompt: equal ones occur once, beginnings of answers are not merged."""
    return sum(len(answer) for _, answer in {(b.prompt, answer) for b in bundles for answer in b.continuations})


def shape(node: Node) -> tuple[object, ...]:
    """A tree as nested tuples, with the leaves' names."""
    return (node.tokens, sorted(node.leaves), tuple(shape(child) for child in node.children))


@few
@given(batches(), thresholds, st.integers(1, 6))
def test_the_mask_is_ancestry(bundles: list[Bundle], min_shared: int, window: int) -> None:
    trees = grow(bundles, min_shared)
    forest = Forest.plant(trees)
    parents = token_parents(trees)
    expected = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    windowed = expected.clone()
    for query in range(len(parents)):
        path = path_to(parents, query)
        expected[query, path] = True
        windowed[query, path[-window:]] = True
        assert forest.position_ids_T[query] == len(path) - 1
    assert torch.equal(forest.dense_mask(), expected)
    assert torch.equal(forest.dense_mask(window), windowed)
    index = torch.arange(len(forest))
    assert bool((forest.subtree_end_T > index).all())
    assert int(forest.subtree_end_T.max()) <= len(forest)


@few
@given(batches(), thresholds)
def test_leaves_stand_for_their_sequences(bundles: list[Bundle], min_shared: int) -> None:
    forest = Forest.plant(grow(bundles, min_shared))
    expected = sequences(bundles)
    assert sorted(forest.leaf_ids) == sorted(expected)
    found = forest.unrolled()
    for name, leaf in zip(forest.leaf_ids, forest.leaf_of_id, strict=True):
        prompt, answer = expected[name]
        assert tuple(found[leaf].tolist()) == prompt + answer
        assert forest.leaf_lengths[leaf] == len(answer)
    assert len(found) == forest.slots == len(set(expected.values())) == len(set(forest.leaf_of_id))
    assert list(forest.leaf_of_id) == sorted(forest.leaf_of_id)
    assert forest.unrolled_tokens == sum(len(prompt) + len(answer) for prompt, answer in expected.values())


@few
@given(batches(), thresholds)
def test_scored_tokens_are_the_answers(bundles: list[Bundle], min_shared: int) -> None:
    forest = Forest.plant(grow(bundles, min_shared))
    expected = sequences(bundles)
    names = {leaf: name for name, leaf in zip(forest.leaf_ids, forest.leaf_of_id, strict=True)}  # one of each leaf's
    targets: dict[int, list[int]] = {name: [] for name in names.values()}
    mask, paths = forest.dense_mask(), list(leaf_paths(forest))
    rows = zip(forest.predictor_S.tolist(), forest.target_S.tolist(), forest.leaf_S.tolist(), strict=True)
    for predictor, target, leaf in rows:
        name = names[leaf]
        prompt, answer = expected[name]
        place = len(prompt) + len(targets[name])  # of the target in its sequence
        # The predictor is the token just before it, and sees exactly the sequence up to itself.
        assert predictor == paths[leaf][place - 1]
        seen = forest.input_ids_T[mask[predictor]].tolist()
        assert tuple(seen) == (prompt + answer)[:place]
        targets[name].append(target)
    assert {name: tuple(ids) for name, ids in targets.items()} == {n: expected[n][1] for n in targets}
    assert forest.leaf_S.tolist() == sorted(forest.leaf_S.tolist())  # split by lengths gives the leaves


@few
@given(batches())
def test_merging_reaches_the_trie(bundles: list[Bundle]) -> None:
    everything = sum(tree.size for tree in grow(bundles, 1))
    assert everything == trie_size(bundles)
    # Nothing but equal prompts, and their equal answers, is merged under an unreachable threshold.
    prompts = {bundle.prompt for bundle in bundles}
    assert sum(tree.size for tree in grow(bundles, 10**9)) == sum(map(len, prompts)) + answer_tokens(bundles)
    assert len(grow(bundles, 10**9)) == len(prompts)


@few
@given(batches(), thresholds)
def test_no_shared_segment_is_shorter_than_the_threshold(bundles: list[Bundle], min_shared: int) -> None:
    prompts = {bundle.prompt for bundle in bundles}
    for tree in grow(bundles, min_shared):
        for node in tree.walk():
            if any(not child.leaves for child in node.children):  # above a fork of prompts
                assert len(node.tokens) >= min_shared
        assert all(node.tokens for node in tree.walk())
        assert not tree.leaves
    if min_shared > max(map(len, prompts)):
        assert all(child.leaves for tree in grow(bundles, min_shared) for child in tree.children)


@few
@given(batches(), thresholds, st.randoms(use_true_random=False))
def test_trees_do_not_depend_on_the_order(bundles: list[Bundle], min_shared: int, rng: random.Random) -> None:
    def canonical(trees: list[Node]) -> list[tuple[object, ...]]:
        for tree in trees:
            for node in tree.walk():
                # Leaves of equal prompts stand in the batch's order; that alone may differ.
                leaves = [child for child in node.children if child.leaves]
                leaves.sort(key=lambda child: min(child.leaves))
                node.children = leaves + [child for child in node.children if not child.leaves]
        return [shape(tree) for tree in trees]

    shuffled = list(bundles)
    rng.shuffle(shuffled)
    assert canonical(grow(bundles, min_shared)) == canonical(grow(shuffled, min_shared))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(batches(max_bundles=8), st.integers(1, 90), st.sampled_from((1, 3, MIN_SHARED)))
def test_packing_keeps_every_bundle_once_and_the_budget(bundles: list[Bundle], budget: int, min_shared: int) -> None:
    groups = pack(bundles, budget, min_shared)
    assert Counter(b.leaf_ids for group in groups for b in group) == Counter(b.leaf_ids for b in bundles)
    assert all(groups)
    for group in groups:
        size = sum(tree.size for tree in grow(group, min_shared))
        assert size <= budget or len(group) == 1


@few
@given(batches(max_bundles=8), st.integers(1, 90), st.randoms(use_true_random=False))
def test_packing_does_not_depend_on_the_order(bundles: list[Bundle], budget: int, rng: random.Random) -> None:
    def contents(groups: list[list[Bundle]]) -> list[list[tuple[object, ...]]]:
        # Names are left out: bundles of equal content may stand for one another.
        return [sorted((b.prompt, b.continuations) for b in group) for group in groups]

    shuffled = list(bundles)
    rng.shuffle(shuffled)
    assert contents(pack(bundles, budget)) == contents(pack(shuffled, budget))


def test_forks_inside_the_threshold_count_in_full() -> None:
    """Three prompts share 12 tokens two by two but only 10 all together: the 2 more occur twice in the tree,
    and the packer has to know."""
    trunk = tuple(range(10))
    prompts = [(*trunk, 90, 91, 1), (*trunk, 90, 91, 2), (*trunk, 95)]
    bundles = [Bundle(prompt, ((7,),), (i,)) for i, prompt in enumerate(prompts)]
    together = sum(tree.size for tree in grow(bundles))
    assert together == 10 + 3 + 3 + 1 + 3
    assert len(pack(bundles, together)) == 1
    assert len(pack(bundles, together - 1)) == 2


def test_a_merge_that_costs_tokens_is_counted() -> None:
    """Three prompts share 15 tokens. A fourth shares 8 of them, after which the other 7 are below the
    threshold and stand three times: together they are more than apart, 4 · 20 − 24 and not 4 · 20 − 30."""
    trunk = tuple(range(15))
    prompts = [(*trunk, 50 + i, 60, 61, 62) for i in range(3)] + [(*trunk[:8], *range(70, 81))]
    bundles = [Bundle(prompt, ((7,),), (i,)) for i, prompt in enumerate(prompts)]
    assert sum(tree.size for tree in grow(bundles)) == 4 * 20 - 24
    for budget in range(50, 57):
        for group in pack(bundles, budget):
            assert sum(tree.size for tree in grow(group)) <= budget


def test_a_bundle_over_the_budget_stands_alone() -> None:
    large = Bundle(tuple(range(30)), ((1, 2), (3,)), (0, 1))
    small = [Bundle((50 + i,), ((1,),), (2 + i,)) for i in range(3)]
    groups = pack([large, *small], 6)
    assert [len(group) for group in groups] == [1, 3]
    assert groups[0] == [large]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((), ((1,),), (0,)), "prompt token"),
        (((1,), ((1,), (2,)), (0,)), "2 continuations but 1"),
        (((1,), ((1,), ()), (0, 1)), "empty continuation"),
    ],
    ids=["no prompt", "a name missing", "an empty answer"],
)
def test_bundles_that_cannot_be_scored(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Bundle(*arguments)  # type: ignore[arg-type]


def test_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pack([], 0)


def test_layout_refuses_what_has_no_predictor() -> None:
    with pytest.raises(ValueError, match="a leaf needs a prompt"):
        Forest.plant([Node((1, 2), leaves=(0,))])
    with pytest.raises(ValueError, match="without tokens"):
        Forest.plant([Node(())])


def test_an_empty_forest_has_empty_arrays() -> None:
    forest = Forest.of([])
    assert len(forest) == 0
    assert forest.leaf_ids == ()
    assert forest.dense_mask().shape == (0, 0)
    assert forest.input_ids_T.dtype == torch.long
    assert forest.predictor_S.shape == forest.target_S.shape == forest.leaf_S.shape == (0,)


def test_thousands_of_bundles_are_packed_in_seconds() -> None:
    """One beginning under all of them, and forks inside it; growing a run anew for each bundle took minutes."""
    rng = random.Random(0)
    system = tuple(range(100, 130))
    prompts = [system + tuple(rng.randrange(3) for _ in range(30)) + (i,) for i in range(3000)]
    bundles = [Bundle(prompt, ((1, 2), (3,)), (2 * i, 2 * i + 1)) for i, prompt in enumerate(prompts)]
    started = time.perf_counter()
    groups = pack(bundles, 2048)
    assert sum(len(group) for group in groups) == 3000
    assert all(sum(tree.size for tree in grow(group)) <= 2048 for group in groups)
    assert len(groups) < 70
    assert time.perf_counter() - started < 30


def test_forks_may_nest_deeper_than_python_recurses() -> None:
    """Conversations that grow turn by turn: each prompt begins the next one."""
    depth = 1500
    prompts = [tuple(range(8 * (n + 1))) for n in range(depth)]
    forest = Forest.of([Bundle(prompt, ((9000 + n,),), (n,)) for n, prompt in enumerate(prompts)])
    assert len(forest) == 8 * depth + depth
    assert forest.leaf_ids == tuple(range(depth))
    assert [segment.position for segment in forest.segments if segment.leaf is not None] == [len(p) for p in prompts]
    assert int(forest.subtree_end_T[0]) == len(forest)
