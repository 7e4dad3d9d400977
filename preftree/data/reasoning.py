"""The marks between which models write their reasoning: `<think> … </think>` and its relatives."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PAIRS = {
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel>thought": "<channel|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
}
"""Marks that are no tags -> what closes them."""

_TAG = r"[\w:.-]*(?:think|thought|reason)[\w:.-]*>"
_OPENING = "|".join((f"<{_TAG}", *map(re.escape, _PAIRS)))
_CLOSING = "|".join((f"</{_TAG}", *map(re.escape, _PAIRS.values())))
_SIGNS = ("<", "[T", "\u25c1")
_MARK = re.compile(f"(?P<opening>{_OPENING})|(?P<closing>{_CLOSING})")


@dataclass(frozen=True, slots=True)
class Opened:
    """Reasoning that a text opens and does not close: its opening mark, and the one that would close it."""

    opening: str
    closing: str


def left_open(text: str) -> Opened | None:
    """The reasoning that `text` leaves open, or None."""
    marks = _marks(text)
    if not marks or not (opening := marks[-1]["opening"]):
        return None
    return Opened(opening, _PAIRS.get(opening, f"</{opening[1:]}"))


def count_marks(text: str) -> int:
    """How many such marks it holds."""
    return len(_marks(text))


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning that a text begins with, without its marks, and what follows it; ("", text) where it has none."""
    marks = _marks(text)
    closing = next((mark for mark in marks if mark["closing"]), None)
    if closing is None:
        return "", text
    opening = next((mark for mark in marks if mark["opening"]), None)
    start = opening.end() if opening is not None and opening.end() <= closing.start() else 0
    return text[start : closing.start()].strip(), text[closing.end() :].lstrip()


def behind_reasoning(text: str) -> str:
    """What follows the last mark that closes reasoning; all of it where there is none."""
    ends = [mark.end() for mark in _marks(text) if mark["closing"]]
    return text[ends[-1] :] if ends else text


def _marks(text: str) -> list[re.Match[str]]:
    # Most texts hold no sign that a mark begins with, and looking for one is far cheaper than the pattern.
    return list(_MARK.finditer(text)) if any(sign in text for sign in _SIGNS) else []
