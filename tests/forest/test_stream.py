"""A stream must ask what its requests ask, each token of their trie once, wherever it is cut."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.forest import ScoreRequest, Stream
from preftree.forest.stream import split_paths

token = st.integers(0, 2)
tokens = st.lists(token, min_size=1, max_size=7).map(tuple)


@st.composite
def batches(draw: st.DrawFn) -> list[ScoreRequest]:
    """Requests that meet by accident, share contexts, repeat, and continue one another."""
    contexts = draw(st.lists(tokens, min_size=1, max_size=4))
    contexts += [context + draw(tokens) for context in contexts[:2]]
    return [ScoreRequest(draw(st.sampled_from(contexts)), draw(tokens)) for _ in range(draw(st.integers(1, 9)))]


def path(request: ScoreRequest) -> tuple[int, ...]:
    return request.context + request.continuation[:-1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches(), st.integers(1, 30))
def test_every_token_of_the_trie_once_and_every_question_asked(requests: list[ScoreRequest], budget: int) -> None:
    trie = {path(request)[: n + 1] for request in requests for n in range(len(path(request)))}
    stream = Stream(requests)
    assert len(stream) == len(trie)
    asked: dict[int, dict[int, tuple[tuple[int, ...], int]]] = defaultdict(dict)
    computed = []
    memory: list[tuple[int, ...]] = []  # what each known token has seen, itself included
    for stretch in stream.cut(budget):
        forest = stretch.forest
        mask = forest.dense_mask()
        seen = [tuple(forest.input_ids_T[row].tolist()) for row in mask]
        assert seen[: stretch.known] == memory
        assert forest.position_ids_T.tolist() == [len(s) - 1 for s in seen]
        assert 1 <= len(forest) - stretch.known <= budget
        fresh = stretch.fresh
        assert torch.equal(fresh.input_ids_T, forest.input_ids_T[stretch.known :])
        assert torch.equal(fresh.position_ids_T, forest.position_ids_T[stretch.known :])
        computed += seen[stretch.known :]
        assert stretch.row_R.tolist() == sorted(set(stretch.row_R.tolist()))
        parts = (x.tolist() for x in (stretch.slot_S, stretch.target_S, stretch.request_S))
        for slot, target, name in zip(*parts, strict=True):
            context = seen[stretch.known + int(stretch.row_R[slot])]
            asked[name][len(context)] = (context, target)
        memory = [seen[k] for k in stretch.keep.tolist()]
    assert sorted(computed) == sorted(trie)
    for name, request in enumerate(requests):
        whole, start = request.context + request.continuation, len(request.context)
        assert asked[name] == {n: (whole[:n], whole[n]) for n in range(start, len(whole))}


def test_by_hand() -> None:
    """A question of two tokens with options 7, 8 and 8 9: two tokens for the question, one for the longer option."""
    requests = [
        ScoreRequest((1, 2), (7,)),
        ScoreRequest((1, 2), (8,)),
        ScoreRequest((1, 2), (8, 9)),
        ScoreRequest((5,), (6,)),
    ]
    (stretch,) = Stream(requests).cut(10)
    assert stretch.forest.input_ids_T.tolist() == [1, 2, 8, 5]
    assert stretch.forest.position_ids_T.tolist() == [0, 1, 2, 0]
    assert stretch.forest.subtree_end_T.tolist() == [3, 3, 3, 4]
    assert stretch.row_R.tolist() == [1, 2, 3]
    assert stretch.slot_S.tolist() == [0, 0, 0, 1, 2]
    assert stretch.target_S.tolist() == [7, 8, 8, 9, 6]
    assert stretch.request_S.tolist() == [0, 1, 2, 2, 3]
    first, second = Stream(requests).cut(2)
    assert (first.known, first.keep.tolist()) == (0, [0, 1])
    assert (second.known, second.forest.input_ids_T.tolist()) == (2, [1, 2, 8, 5])
    assert second.keep.tolist() == []


def test_thousands_of_requests_are_no_matter() -> None:
    rng = random.Random(0)
    shots = tuple(rng.randrange(50000) for _ in range(300))
    requests = [
        ScoreRequest(shots + tuple(rng.randrange(50000) for _ in range(20)), (rng.randrange(50000),))
        for _ in range(4000)
    ]
    stream = Stream(requests)
    assert len(stream) <= 300 + 4000 * 20
    assert sum(len(s.forest) - s.known for s in stream.cut(2048)) == len(stream)


def test_parts_are_even_and_lose_little_sharing() -> None:
    rng = random.Random(1)
    prefixes = [bytes(rng.randrange(256) for _ in range(400)) for _ in range(6)]
    paths = [rng.choice(prefixes) + bytes(rng.randrange(256) for _ in range(40)) for _ in range(60)]
    parts = split_paths(paths, 3)
    assert sorted(i for part in parts for i in part) == list(range(60))
    assert all(parts)
    split_prefixes = sum(len({paths[i][:400] for i in part}) for part in parts)
    assert split_prefixes <= 6 + 2  # each of the two cuts goes through one prefix at most
    assert split_paths([], 2) == [[], []]


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="at least one context token"):
        ScoreRequest((), (1,))
    with pytest.raises(ValueError, match="empty continuation"):
        ScoreRequest((1,), ())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        next(Stream([ScoreRequest((1,), (2,))]).cut(0))
    assert list(Stream([]).cut(8)) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches(), st.integers(1, 30))
def test_segments_say_what_the_mask_says(requests: list[ScoreRequest], budget: int) -> None:
    for stretch in Stream(requests).cut(budget):
        forest = stretch.forest
        mask = torch.zeros(len(forest), len(forest), dtype=torch.bool)
        assert [s.start for s in forest.segments[1:]] == [s.end for s in forest.segments[:-1]]
        for index, segment in enumerate(forest.segments):
            assert not segment.start < stretch.known < segment.end
            for row in range(segment.start, segment.end):
                assert forest.position_ids_T[row] == segment.position + row - segment.start
                mask[row, segment.start : row + 1] = True
                for above in forest.ancestors(index):
                    mask[row, forest.segments[above].start : forest.segments[above].end] = True
        assert torch.equal(mask, forest.dense_mask())
