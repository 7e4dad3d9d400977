"""The marks between which models write their reasoning: `<think> … </think>` and its relatives."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(
    r"<(?P<end1>/?)(?P<name>[\w:.-]*(?:think|thought|reason)[\w:.-]*)>"
    r"|\[(?P<end2>/?)THINK\]"
    r"|<\|(?P<start3>START|END)_THINKING\|>"
    r"|<\|(?P<start4>begin|end)_of_thought\|>"
    r"|\u25c1(?P<end5>/?)think\u25b7",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Opened:
    """Reasoning that a text opens and does not close: its opening mark, and the one that would close it."""

    opening: str
    closing: str


def left_open(text: str) -> Opened | None:
    """The reasoning that `text` leaves open, or None."""
    marks = list(_TAG.finditer(text))
    return Opened(marks[-1].group(), _closing(marks[-1])) if marks and not _closes(marks[-1]) else None


def has_marks(text: str) -> bool:
    """Does it hold such a mark?"""
    return _TAG.search(text) is not None


def behind_reasoning(text: str) -> str:
    """What follows the last mark that closes reasoning; all of it where there is none."""
    ends = [found.end() for found in _TAG.finditer(text) if _closes(found)]
    return text[ends[-1] :] if ends else text


def _closes(found: re.Match[str]) -> bool:
    groups = found.groupdict()
    return bool(
        groups["end1"]
        or groups["end2"]
        or groups["end5"]
        or (groups["start3"] or "").upper() == "END"
        or (groups["start4"] or "").lower() == "end"
    )


def _closing(found: re.Match[str]) -> str:
    text = found.group()
    if found["start3"]:
        return text.replace("START", "END")
    if found["start4"]:
        return text.replace("begin", "end")
    return f"{text[0]}/{text[1:]}"
