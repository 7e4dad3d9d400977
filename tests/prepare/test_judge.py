"""Which answers may stand as rejected ones."""

from __future__ import annotations

import pytest

from preftree.model.generate import Answer
from preftree.prepare.judge import CUT, EMPTY, LIKE_CHOSEN, LIKE_OTHER, NO_SENTENCE, judge, trim


def verdict(text: str, finished: bool = True, others=(), cut: str = "trim", failure: str = "") -> tuple[str, str]:
    answer = Answer(text, finished, failure)
    return judge(answer, "The cat sat on the mat.", others, max_similarity=0.8, cut_answers=cut)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"text": "A dog did."}, ("A dog did.", "")),
        ({"text": "the cat sat on the MAT"}, ("", LIKE_CHOSEN)),
        ({"text": "  "}, ("", EMPTY)),
        ({"text": "A dog did.", "others": ["No.", "A dog did"]}, ("", LIKE_OTHER)),
        ({"text": "It was the dog. The cat", "finished": False}, ("It was the dog.", "")),
        ({"text": "It was the dog. The cat", "finished": False, "cut": "keep"}, ("It was the dog. The cat", "")),
        ({"text": "It was the dog. The cat", "finished": False, "cut": "drop"}, ("", CUT)),
        ({"text": "It was the", "finished": False}, ("", NO_SENTENCE)),
        ({"text": "", "finished": False}, ("", EMPTY)),
        ({"text": "The cat sat on the mat. And", "finished": False}, ("", LIKE_CHOSEN)),
        ({"text": "", "failure": "refused"}, ("", "refused")),
        ({"text": "!"}, ("!", "")),
    ],
)
def test_verdicts(asked, expected) -> None:
    assert verdict(**asked) == expected


def test_a_near_copy_of_a_long_answer_is_one() -> None:
    long = " ".join(f"word{i}" for i in range(60))
    one_off = long.replace("word30", "other")
    assert judge(Answer(one_off, True), long, (), max_similarity=0.8, cut_answers="trim")[1] == LIKE_CHOSEN
    assert judge(Answer(one_off, True), long, (), max_similarity=1.0, cut_answers="trim") == (one_off, "")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("Anything at all", True), "Anything at all"),
        (Answer("It is a sea. Then it", False), "It is a sea."),
        (Answer("Two of them are red.\n1. Bl", False), "Two of them are red."),
        (Answer("Yes. Well the thing", False), ""),
        (Answer("no end in sight", False), ""),
        (Answer("it costs 3.50 or", False), ""),
    ],
)
def test_a_cut_answer_is_trimmed_to_a_sentence(answer: Answer, expected: str) -> None:
    assert trim(answer) == expected
