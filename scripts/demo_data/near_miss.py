"""Wrong answers by construction: the right one with a piece missing, and so no longer than it.

The model's own wrong answers are nearly all longer than the right ones, so that "the shorter answer" would be all there
is to learn. `balanced` puts near misses in the place of some of them until length says nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from preftree.demo.checks import passes
from scripts.demo_data.kinds import Example


def near_miss(example: Example) -> str:
    """A wrong answer that is shorter than the right one, or as long; "" where there is none."""
    candidates = (example.near_miss, *_CANDIDATES[example.check["type"]](example.check, example.chosen))
    fitting = (text for text in candidates if text and len(text) <= len(example.chosen))
    return next((text for text in fitting if not passes(example.check, text)), "")


def balanced(examples: Sequence[Example], sampled: Sequence[str]) -> list[str]:
    """The rejected answers: the sampled ones, or near misses where more of a kind's sampled ones were longer than
    the chosen one than shorter; kinds whose right answers have no piece to leave out are made up for by the others."""
    surplus: Counter[str] = Counter()
    rejected = []
    for example, text in zip(examples, sampled, strict=True):
        longer = len(text) > len(example.chosen)
        if longer and max(surplus[example.kind], surplus.total()) > 0:
            text = near_miss(example) or text
        difference = len(text) - len(example.chosen)
        surplus[example.kind] += (difference > 0) - (difference < 0)
        rejected.append(text)
    return rejected


def _without_a_word(check: dict[str, Any], chosen: str) -> list[str]:
    """Without the last word; of a single word, without what follows its first "@" or "."."""
    words = chosen.split(" ")
    if len(words) > 1:
        return [" ".join(words[:-1]).rstrip(",;.")]
    return [chosen[:place] for place in (chosen.find("@"), chosen.find(".")) if place > 0]


def _other_number(check: dict[str, Any], chosen: str) -> list[str]:
    """Without the last digit; of a single digit, one less."""
    return [chosen[:-1] or str(int(chosen) - 1)]


def _less_json(check: dict[str, Any], chosen: str) -> list[str]:
    """The same object in one line without its last key."""
    return [json.dumps(dict(list(check["values"].items())[:-1]))]


def _without_a_line(check: dict[str, Any], chosen: str) -> list[str]:
    return ["\n".join(chosen.split("\n")[:-1])]


def _without_an_item(check: dict[str, Any], chosen: str) -> list[str]:
    return [check["by"].join(chosen.split(check["by"])[:-1])]


def _without_the_end(check: dict[str, Any], chosen: str) -> list[str]:
    """Without the last sentence; of a single one, without its full stop."""
    *sentences, last = chosen.split(". ")
    return [". ".join(sentences) + "." if sentences else "", last.removesuffix(".")]


_CANDIDATES: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
    "exact": _without_a_word,
    "one_of": _without_a_word,
    "number": _other_number,
    "json": _less_json,
    "bullets": _without_a_line,
    "separated": _without_an_item,
    "word_count": _without_a_word,
    "lowercase": _without_the_end,
    "sentences": _without_the_end,
}
"""Type of check -> function of (check, chosen answer), gives shorter answers of which some are wrong."""
