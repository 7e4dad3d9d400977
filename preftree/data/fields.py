"""The values in a row's columns, checked: each function says what is wrong and what was found instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from preftree.data.dialogue import is_dialogue
from preftree.data.files import Row
from preftree.data.messages import RowProblem, found, turns_of
from preftree.data.record import Turn
from preftree.errors import did_you_mean


class RowSkipped(Exception):
    """A sound row without a usable preference; the message is the reason it is counted under."""


def kind_of(value: object) -> str:
    """text, dialogue (HH-RLHF's "Human: … Assistant: …" text), answer (messages that begin with the
    assistant's), conversation (messages that begin otherwise), or the name of the value's type."""
    if isinstance(value, str):
        return "dialogue" if is_dialogue(value) else "text"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "answer" if value[0].get("role") == "assistant" else "conversation"
    return type(value).__name__


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def extra_of(row: Row, used: Iterable[str]) -> dict[str, Any] | None:
    """The columns that are not used, or None."""
    return {name: value for name, value in row.items() if name not in used} or None


def value_of(row: Row, column: str) -> Any:
    """What stands in a column that must be there."""
    if column not in row:
        raise RowProblem(f"it has no column `{column}`.{did_you_mean(column, map(str, row))}")
    return row[column]


def text_of(row: Row, column: str) -> str:
    """The text in a column that must be there."""
    value = value_of(row, column)
    if not isinstance(value, str):
        raise RowProblem(f"column `{column}` must be text. Got {found(value)} instead.")
    return value


def split_system(turns: tuple[Turn, ...], column: str) -> tuple[str | None, tuple[Turn, ...]]:
    """The system text that the turns begin with (or None), and the others."""
    system = turns[0].content if turns[0].role == "system" else None
    rest = turns if system is None else turns[1:]
    if not rest:
        raise RowProblem(f"column `{column}` holds a system message and nothing to answer")
    return system, rest


def prompt_of(row: Row, column: str) -> tuple[str | None, tuple[Turn, ...]]:
    """System text and turns of a prompt that is a text or a list of messages."""
    value = value_of(row, column)
    if isinstance(value, str):
        return None, (Turn("user", value),)
    return split_system(turns_of(value, column), column)


def system_of(row: Row, of_turns: str | None) -> str | None:
    """The text of the column `system` or `system_prompt`, else the one that the messages began with.

    An empty column says that there is no system message; an empty message is one.
    """
    column = next((name for name in ("system", "system_prompt") if row.get(name) is not None), None)
    if column is None:
        return of_turns
    text = text_of(row, column)
    if of_turns is not None and text and text != of_turns:
        raise RowProblem(f"column `{column}` and the prompt's system message differ; keep one of them")
    return text or of_turns


def rank_of(value: object, where: str) -> int | None:
    """A whole number, or None for none."""
    if value is None:
        return None
    rank = number(value, where)
    if rank != int(rank):
        raise RowProblem(f"{where}: a rank must be a whole number, 1 for the best. Got {value!r} instead.")
    return int(rank)


def number(value: object, where: str) -> float:
    """A finite number; texts of one count, since a CSV has nothing else."""
    try:
        read = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        read = math.nan
    if not math.isfinite(read):
        raise RowProblem(f"{where} must be a number. Got {found(value)} instead.")
    return read


def label(row: Row) -> bool:
    """The `label` of a KTO row."""
    value = value_of(row, "label")
    known = {"true": True, "1": True, "false": False, "0": False}
    word = str(value).strip().lower() if isinstance(value, bool | int | str) else ""
    if word not in known:
        raise RowProblem(f"column `label` must be true or false. Got {found(value)} instead.")
    return known[word]
