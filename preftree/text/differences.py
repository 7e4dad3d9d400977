"""Two answers to one prompt, with what differs marked: for tables on a terminal, in HTML, and in chat.

Pure functions of texts. Words are compared, with the white space behind them, so that marks never split a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_WORD = re.compile(r"\s*\S+\s*?(?=\s|$)|\s+")
#: Answers with fewer words in common than this share are two texts, and marking their few common words says nothing.
_ALIKE = 0.3


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; `changed` where the other answer does not have it."""

    text: str
    changed: bool


@dataclass(frozen=True)
class AnswerRow:
    """One prompt with two answers in pieces; the pieces of an answer joined are its text."""

    prompt: str
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]

    @property
    def changed(self) -> bool:
        """Do the answers differ at all?"""
        return any(piece.changed for piece in (*self.before, *self.after))


def answer_rows(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[AnswerRow]:
    """Prompts with their answers by two models, differences marked, in the order given."""
    return [
        AnswerRow(prompt, *marked(first, second)) for prompt, first, second in zip(prompts, before, after, strict=True)
    ]


def marked(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts in pieces, equal ones and changed ones; texts that have little in common are changed as a whole."""
    if before == after:
        same = (Piece(before, False),) if before else ()
        return same, same
    first, second = _WORD.findall(before), _WORD.findall(after)
    matcher = SequenceMatcher(a=first, b=second, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return _pieces([(before, True)]), _pieces([(after, True)])
    left, right = [], []
    for what, a, b, c, d in matcher.get_opcodes():
        left.append(("".join(first[a:b]), what != "equal"))
        right.append(("".join(second[c:d]), what != "equal"))
    return _pieces(left), _pieces(right)


def _pieces(spans: Sequence[tuple[str, bool]]) -> tuple[Piece, ...]:
    return tuple(Piece(text, changed) for text, changed in spans if text)
