"""Every check against answers that a person would call right and wrong."""

from __future__ import annotations

import json

import pytest

from preftree.demo.checks import CHECKS, passes
from preftree.errors import DataError

EMAIL = {"type": "exact", "text": "ana@dock.example"}
CAPITALS = {"type": "exact", "text": "THE DOG SLEEPS"}
WORD = {"type": "one_of", "accept": ["small", "little"]}
NUMBER = {"type": "number", "value": 180}
JSON = {"type": "json", "values": {"name": "Ana", "age": 31}}
BULLETS = {"type": "bullets", "count": 3}
SEPARATED = {"type": "separated", "by": ";", "count": 3}
THREE_WORDS = {"type": "word_count", "count": 3}
LOWERCASE = {"type": "lowercase", "mention": "sea"}
SENTENCES = {"type": "sentences", "count": 2, "mention": "sea"}

RIGHT = [
    (EMAIL, "ana@dock.example"),
    (EMAIL, "  ana@dock.example\n"),
    (EMAIL, "ana@dock.example."),
    (CAPITALS, "THE DOG SLEEPS"),
    (WORD, "little"),
    (WORD, "Small."),
    (NUMBER, "180"),
    (NUMBER, "180."),
    (JSON, '{"name": "Ana", "age": 31}'),
    (JSON, '{\n  "age": "31",\n  "name": "Ana"\n}'),
    (BULLETS, "- apple\n- red pear\n- plum"),
    (BULLETS, "* Apple\n* Pear\n* Plum"),
    (SEPARATED, "apple; pear; plum"),
    (SEPARATED, "apple;pear;Plum"),
    (THREE_WORDS, "deep blue salty"),
    (THREE_WORDS, "Deep well-known salty"),
    (LOWERCASE, "the sea is deep and blue."),
    (LOWERCASE, "ships cross the seas!"),
    (SENTENCES, "The sea is deep. Ships cross it daily."),
    (SENTENCES, "Is the sea deep? It is 3.5 miles deep!"),
]

WRONG = [
    (EMAIL, "The email address is ana@dock.example."),
    (EMAIL, '"ana@dock.example"'),
    (EMAIL, "Ana@dock.example"),
    (EMAIL, "ana@dock.example.."),
    (CAPITALS, "The dog sleeps"),
    (WORD, "tiny"),
    (WORD, "'small'"),
    (WORD, "small, little"),
    (WORD, "The opposite is small"),
    (NUMBER, "180 minutes"),
    (NUMBER, "one hundred and eighty"),
    (NUMBER, "1800"),
    (NUMBER, "180.0"),
    (JSON, '```json\n{"name": "Ana", "age": 31}\n```'),
    (JSON, 'Here it is: {"name": "Ana", "age": 31}'),
    (JSON, '{"name": "Ana"}'),
    (JSON, '{"name": "Ana", "age": 31, "city": "Oslo"}'),
    (JSON, '{"name": "Ben", "age": 31}'),
    (JSON, "{'name': 'Ana', 'age': 31}"),
    (JSON, '["name", "age"]'),
    (JSON, '{"name": "Ana", "age": 31'),
    (JSON, "[" * 100_000),
    (BULLETS, "- apple\n- pear"),
    (BULLETS, "- apple\n- pear\n- plum\n- fig"),
    (BULLETS, "Sure:\n- apple\n- pear\n- plum"),
    (BULLETS, "1. apple\n2. pear\n3. plum"),
    (BULLETS, "- apple\n- apple\n- Apple"),
    (BULLETS, "- apple\n\n- pear\n- plum"),
    (BULLETS, "- apple\n- pear\n-"),
    (BULLETS, "- apple\n- pear\n- Plum: a purple fruit with a stone"),
    (SEPARATED, "apple, pear, plum"),
    (SEPARATED, "apple; pear; plum;"),
    (SEPARATED, "apple; pear"),
    (SEPARATED, "apple;\npear;\nplum"),
    (SEPARATED, "apple, fig; pear; plum"),
    (THREE_WORDS, "deep blue"),
    (THREE_WORDS, "deep, blue, salty"),
    (THREE_WORDS, "deep deep deep"),
    (THREE_WORDS, "deep\nblue salty"),
    (THREE_WORDS, "deep blue 7"),
    (LOWERCASE, "The sea is deep and blue."),
    (LOWERCASE, "the lake is deep and blue."),
    (LOWERCASE, "the sea is deep and blue"),
    (LOWERCASE, "the sea is deep. ships cross it daily."),
    (LOWERCASE, "sea."),
    (SENTENCES, "The sea is deep."),
    (SENTENCES, "The sea is deep. Ships cross it. Fish live there too."),
    (SENTENCES, "The sea is deep. Ships cross it and"),
    (SENTENCES, "The sea is deep. Yes."),
    (SENTENCES, "The lake is deep. Ships cross it daily."),
    (SENTENCES, "The sea is deep.\nShips cross it daily."),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_right_answers_pass(check: dict, answer: str) -> None:
    assert passes(check, answer)


@pytest.mark.parametrize(("check", "answer"), WRONG)
def test_wrong_answers_fail(check: dict, answer: str) -> None:
    assert not passes(check, answer)


@pytest.mark.parametrize("answer", ["", " ", "\n", ".", "- ", "{}", ";", "\x00", "é" * 1000])
@pytest.mark.parametrize("check", {check["type"]: check for check, _ in RIGHT}.values(), ids=lambda c: c["type"])
def test_degenerate_answers_fail_without_an_exception(check: dict, answer: str) -> None:
    assert not passes(check, answer)


def test_every_type_is_tested_both_ways() -> None:
    assert {check["type"] for check, _ in RIGHT} == set(CHECKS) == {check["type"] for check, _ in WRONG}


def test_a_check_may_be_given_as_json_text() -> None:
    assert passes(json.dumps(NUMBER), "180")
    assert not passes(json.dumps(NUMBER), "181")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"type": "bullet", "count": 3}, "Did you mean bullets"),
        ({"count": 3}, "does not exist"),
        ({"type": ["number"]}, "does not exist"),
        ({"type": "number"}, "lacks the field 'value'"),
        ("{number}", "is not JSON"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_a_bad_check_is_a_clear_error(check: dict | str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        passes(check, "180")
