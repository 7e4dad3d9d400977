"""What a record prefers: ranks first, scores where there are no ranks, nothing where they are equal."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftree.data.record import LoadedPairs, PreferencePair, PreferenceRecord, Response, Turn

ASK = (Turn("user", "Which?"),)


def record(*responses: Response) -> PreferenceRecord:
    return PreferenceRecord("Be brief.", ASK, responses, source="a.jsonl:3", row=2)


def test_best_against_worst_by_rank_with_place_and_prompt() -> None:
    pair = record(Response("b", rank=2), Response("c", rank=3), Response("a", rank=1)).pairs()
    assert pair == [PreferencePair("Be brief.", ASK, "a", "c", "a.jsonl:3", 2)]


def test_scores_order_answers_that_have_no_rank() -> None:
    (pair,) = record(Response("low", score=1.5), Response("high", score=4.0)).pairs()
    assert (pair.chosen, pair.rejected) == ("high", "low")


def test_ranks_go_before_scores() -> None:
    (pair,) = record(Response("x", score=9.0, rank=2), Response("y", score=1.0, rank=1)).pairs()
    assert (pair.chosen, pair.rejected) == ("y", "x")


@pytest.mark.parametrize(
    "responses",
    [
        (),
        (Response("only", rank=1),),
        (Response("a", rank=1), Response("b", rank=1)),
        (Response("a", score=1.0), Response("b")),
        (Response("a", rank=1), Response("b", score=2.0)),
    ],
    ids=["none", "one", "equal ranks", "a score missing", "rank and score"],
)
def test_no_pair_where_nothing_is_preferred(responses: tuple[Response, ...]) -> None:
    assert record(*responses).pairs() == []


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6))
def test_pair_has_the_extreme_ranks(ranks: list[int]) -> None:
    pairs = record(*(Response(f"{place} {rank}", rank=rank) for place, rank in enumerate(ranks))).pairs()
    if len(set(ranks)) == 1:
        assert pairs == []
    else:
        assert pairs[0].chosen == f"{ranks.index(min(ranks))} {min(ranks)}"
        assert pairs[0].rejected == f"{ranks.index(max(ranks))} {max(ranks)}"


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().row = 5  # type: ignore[misc]
    assert not hasattr(record(), "__dict__")


def test_loaded_pairs_are_a_list_and_tell_about_the_load() -> None:
    loaded = LoadedPairs(record(Response("a", rank=1), Response("b", rank=2)).pairs())
    loaded.format, loaded.files, loaded.rows = "KTO labels", ["k.jsonl"], 4
    loaded.skipped["no opposite"] += 2
    loaded.left_out = ["test.jsonl"]
    assert isinstance(loaded, list)
    assert loaded.summary() == [
        "Read 1 pairs from 4 rows of k.jsonl (KTO labels).",
        "Skipped 2 rows: no opposite.",
        "Left out, as files of another split: test.jsonl.",
    ]


def slow_pairs(keys: list[int], rule: str) -> list[tuple[int, int]]:
    """All ordered pairs of which the first is better, thinned out as the rule says."""
    better = [(a, b) for a in range(len(keys)) for b in range(len(keys)) if keys[a] < keys[b]]
    first_best = keys.index(min(keys))
    if rule == "best_worst":
        return [(a, b) for a, b in better if a == first_best and b == keys.index(max(keys))]
    return [(a, b) for a, b in better if rule == "all" or a == first_best]


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
    st.sampled_from(["all", "best_each", "best_worst"]),
    st.integers(0, 3),
)
def test_rules_against_the_definition(ranks: list[int], rule: str, margin: int) -> None:
    # Scores fall as ranks rise, so a margin in scores is a difference of ranks.
    answers = [Response(str(i), score=10.0 - rank, rank=rank) for i, rank in enumerate(ranks)]
    found = [(int(p.chosen), int(p.rejected)) for p in record(*answers).pairs(rule, float(margin))]
    assert found == [(a, b) for a, b in slow_pairs(ranks, rule) if ranks[b] - ranks[a] > margin]
    # Without ranks the scores say the same.
    unranked = [Response(answer.text, answer.score) for answer in answers]
    assert [(int(p.chosen), int(p.rejected)) for p in record(*unranked).pairs(rule, float(margin))] == found


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 3))
def test_a_list_holds_every_answer_with_its_rank(keys: list[int], margin: int) -> None:
    answers = [Response(str(i), score=10.0 - key) for i, key in enumerate(keys)]
    made = record(*answers).pairs("list", float(margin))
    if max(keys) - min(keys) <= margin:
        assert made == []
        return
    (pair,) = made
    places = [int(answer.content) for answer in pair.answers]
    assert sorted(places) == list(range(len(keys)))
    assert (keys[places[0]], keys[places[1]]) == (min(keys), max(keys))
    if len(keys) == 2:
        assert pair.ranks == (1, 2)
    starts = {rank: min(k for k, r in ranked) for rank, ranked in by_rank(keys, places, pair.ranks).items()}
    assert list(starts) == list(range(1, len(starts) + 1))
    for place, rank in zip(places, pair.ranks, strict=True):
        assert starts[rank] <= keys[place] <= starts[rank] + margin
    assert all(later - earlier > margin for earlier, later in pairwise(starts.values()))


def by_rank(keys: list[int], places: list[int], ranks: tuple[int, ...]) -> dict[int, list[tuple[int, int]]]:
    groups: dict[int, list[tuple[int, int]]] = {}
    for place, rank in sorted(zip(places, ranks, strict=True), key=lambda item: item[1]):
        groups.setdefault(rank, []).append((keys[place], rank))
    return groups


def test_a_margin_needs_scores() -> None:
    ranked = record(Response("a", rank=1), Response("b", rank=3))
    assert ranked.pairs() != []
    assert ranked.pairs(min_margin=0.5) == []
    assert not ranked.scored
