"""HH-RLHF's dialogues: one text of "Human: … Assistant: …" turns."""

from __future__ import annotations

import re

from preftree.data.messages import RowProblem
from preftree.data.record import Turn

_START = re.compile(r"\s*\b(Human|Assistant):")
_HEADING = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ON_A_LINE = re.compile(r"(?:^|\n)(Human|Assistant):")
_FIRST = re.compile(r"\n\nHuman:")
_OPENS_ANSWER = re.compile(r"\n\nAssistant:\s*\Z")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    """Does it begin with a heading of its own paragraph, or with one and another follows?"""
    return bool(_START.match(text)) and (text.startswith("\n") or len(_parts(text)) > 3)


def split_preamble(text: str) -> tuple[str, str]:
    """The instructions before a dialogue that ends where the assistant answers, and that dialogue; or "" and `text`."""
    first = _FIRST.search(text)
    if first is None or not _OPENS_ANSWER.search(text):
        return "", text
    before = text[: first.start()].strip()
    return ("", text) if is_dialogue(text) else (before.removeprefix("System:").strip(), text[first.start() :])


def dialogue_turns(text: str, column: str) -> tuple[Turn, ...]:
    """The turns; a heading at the end with nothing behind it opens the answer and is no turn."""
    before, *parts = _parts(text)
    if before.strip() or not parts:
        raise RowProblem(f'column `{column}` must begin with "Human:" or "Assistant:", as HH-RLHF texts do')
    turns = [Turn(_ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if len(turns) > 1 and turns[-1] == Turn("assistant", ""):
        turns.pop()
    return tuple(turns)


def without_heading(answer: str) -> str:
    """An answer without the heading "Assistant:" and the white space around it."""
    found = _START.match(answer)
    return answer[found.end() :].strip() if found and found.group(1) == "Assistant" else answer.strip()


def _parts(text: str) -> list[str]:
    """What stands before the first heading, then a heading and its text in turn."""
    parts = _HEADING.split(text)
    return parts if len(parts) > 3 else _ON_A_LINE.split(text)
