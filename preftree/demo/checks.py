"""Programs that say whether an answer does what its prompt asked: the demo's only judge.

A check is a small JSON object with a `type` and that type's fields, stored in the `check` column:

    {"type": "exact", "text": "ana@dock.example"}       the answer is this text and nothing else
    {"type": "one_of", "accept": ["cold", "chilly"]}    one of these, in upper or lower case
    {"type": "number", "value": 180}                    these digits and nothing else
    {"type": "json", "values": {"name": "Ana"}}         a JSON object with these keys and values only
    {"type": "bullets", "count": 3}                     this many lines '- item' (or '* item'), 1 to 4 words
    {"type": "separated", "by": ";", "count": 3}        one line of this many items of 1 to 4 words
    {"type": "word_count", "count": 4}                  this many words of letters, single spaces between
    {"type": "lowercase", "mention": "sea"}             one sentence without capitals that has this word
    {"type": "sentences", "count": 2, "mention": "sea"} this many sentences, one of which has this word

Strict on purpose: a right answer after "Sure, here it is:", or in quotes, or with a reason behind it is
wrong. Forgiven are white space around the answer and, in `exact`, `one_of` and `number`, one full stop
at the end: "Yes." says what "Yes" says, and the gain we show should not be one of full stops. To add a
check, write one function and one line in `CHECKS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from preftree.errors import DataError, did_you_mean

Check = Mapping[str, Any]
"""`type` and the fields of that type."""

# A full stop counts as an end only before white space or at the end of the text, so that "3.5" and
# "b.example" do not end a sentence.
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_MAX_ITEM_WORDS = 4
_MIN_SENTENCE_WORDS = 3


def passes(check: Check | str, answer: str) -> bool:
    """Whether `answer` does what `check` (an object, or the same as JSON text) asks.

    Raises DataError for a check that is not JSON, has an unknown type, or lacks a field.
    """
    fields = _parse(check)
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in CHECKS:
        hint = did_you_mean(str(kind), CHECKS)
        raise DataError(
            f"The check {dict(fields)!r} has the type {kind!r}, which does not exist.{hint} "
            f"Use one of: {', '.join(CHECKS)}."
        )
    try:
        return CHECKS[kind](fields, answer.strip())
    except KeyError as missing:
        raise DataError(
            f"The check {dict(fields)!r} lacks the field {missing.args[0]!r}. "
            f"Add it: preftree/demo/checks.py lists the fields of every type."
        ) from None


def _parse(check: Check | str) -> Check:
    if not isinstance(check, str):
        return check
    try:
        fields = json.loads(check)
    except json.JSONDecodeError as error:
        raise DataError(
            f'The check {check!r} is not JSON ({error}). Write an object such as {{"type": "number", "value": 3}}.'
        ) from None
    if not isinstance(fields, dict):
        raise DataError(f"The check {check!r} is not a JSON object. Write one with a field 'type'.")
    return fields


def _exact(check: Check, answer: str) -> bool:
    return answer.removesuffix(".") == check["text"]


def _one_of(check: Check, answer: str) -> bool:
    return answer.removesuffix(".").lower() in {text.lower() for text in check["accept"]}


def _number(check: Check, answer: str) -> bool:
    return answer.removesuffix(".") == str(check["value"])


def _json(check: Check, answer: str) -> bool:
    try:
        found = json.loads(answer)
    except (json.JSONDecodeError, RecursionError):
        return False
    wanted = check["values"]
    # 31 and "31" are both fine: the prompts do not say whether a number goes in quotes.
    return (
        isinstance(found, dict)
        and found.keys() == wanted.keys()
        and all(str(found[key]) == str(value) for key, value in wanted.items())
    )


def _bullets(check: Check, answer: str) -> bool:
    lines = [line.rstrip() for line in answer.splitlines()]
    return all(line.startswith(("- ", "* ")) for line in lines) and _distinct_items(
        [line[2:] for line in lines], check["count"]
    )


def _separated(check: Check, answer: str) -> bool:
    return "\n" not in answer and _distinct_items(answer.split(check["by"]), check["count"])


def _distinct_items(items: list[str], count: int) -> bool:
    """Whether there are `count` different items, each a few words of letters without a final stop."""
    names = [item.strip().lower() for item in items]
    short = all(
        1 <= len(name.split()) <= _MAX_ITEM_WORDS and all(_WORD.fullmatch(word) for word in name.split())
        for name in names
    )
    return short and len(names) == count and len(set(names)) == count


def _word_count(check: Check, answer: str) -> bool:
    words = answer.split(" ")
    different = {word.lower() for word in words}
    return (
        len(words) == check["count"] and len(different) == len(words) and all(_WORD.fullmatch(word) for word in words)
    )


def _lowercase(check: Check, answer: str) -> bool:
    return answer == answer.lower() and _has_sentences(answer, 1, check["mention"])


def _sentences(check: Check, answer: str) -> bool:
    return _has_sentences(answer, check["count"], check["mention"])


def _has_sentences(answer: str, count: int, mention: str) -> bool:
    """Whether `answer` is one line of `count` complete sentences, with the word `mention` among them.

    A sentence has at least three words. Abbreviations such as "Dr. Who" count as an end: our prompts
    do not call for them, and a rule that a reader can predict is worth more here.
    """
    *sentences, rest = _SENTENCE_END.split(answer)
    return (
        not rest.strip()
        and "\n" not in answer
        and len(sentences) == count
        and all(len(_WORD.findall(sentence)) >= _MIN_SENTENCE_WORDS for sentence in sentences)
        and re.search(rf"\b{re.escape(mention.lower())}", answer.lower()) is not None
    )


CHECKS: dict[str, Callable[[Check, str], bool]] = {
    "exact": _exact,
    "one_of": _one_of,
    "number": _number,
    "json": _json,
    "bullets": _bullets,
    "separated": _separated,
    "word_count": _word_count,
    "lowercase": _lowercase,
    "sentences": _sentences,
}
