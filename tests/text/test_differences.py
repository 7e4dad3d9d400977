"""Marked differences: nothing of a text is lost, and what is marked is what differs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftree.text.differences import Piece, answer_rows, marked

TEXTS = st.text(alphabet=st.sampled_from("ab é\n\t.\u3000"), max_size=40)


@given(TEXTS, TEXTS)
def test_pieces_joined_are_the_texts(before: str, after: str) -> None:
    first, second = marked(before, after)
    assert "".join(piece.text for piece in first) == before
    assert "".join(piece.text for piece in second) == after
    assert any(piece.changed for piece in (*first, *second)) == (before != after)
    unchanged = ["".join(piece.text for piece in pieces if not piece.changed) for pieces in (first, second)]
    assert unchanged[0] == unchanged[1]


def test_marks_are_words() -> None:
    first, second = marked("The capital is Paris, of course.", "The capital is Rome, of course.")
    assert first == (Piece("The capital is", False), Piece(" Paris,", True), Piece(" of course.", False))
    assert second[1] == Piece(" Rome,", True)


@pytest.mark.parametrize(("before", "after"), [("one two three", "four five six"), ("", "an answer")])
def test_answers_with_little_in_common_are_changed_as_a_whole(before: str, after: str) -> None:
    first, second = marked(before, after)
    assert [piece.text for piece in second] == [after]
    assert all(piece.changed for piece in (*first, *second))


def test_rows_keep_their_order_and_know_whether_something_changed() -> None:
    rows = answer_rows(["p", "q"], ["same", "old words"], ["same", "new words"])
    assert [(row.prompt, row.changed) for row in rows] == [("p", False), ("q", True)]
