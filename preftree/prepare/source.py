"""Rows of an instruction set, streamed: OpenOrca's columns, and the usual other names for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from preftree.config.prepare import SourceSettings
from preftree.data.messages import RowProblem
from preftree.data.scan import Table
from preftree.data.sources import Source, find_tables
from preftree.errors import DataError

SOURCE_COLUMNS = {
    "id": ("id",),
    "system": ("system_prompt", "system"),
    "question": ("question", "instruction", "prompt"),
    "response": ("response", "chosen", "output", "answer", "completion"),
    "teacher": ("teacher", "generator", "model"),
}
"""What a row tells us -> the columns that may hold it; the first one that is there counts."""

UNREADABLE = "the row cannot be read"
NO_QUESTION = "the question is missing or empty"
NO_ANSWER = "the answer is missing or empty"

_FAMILY = re.compile(r"(flan|t0|cot|niv)\b", re.I)
_TEACHERS = (("gpt-4", re.compile(r"gpt[-_ ]?4", re.I)), ("gpt-3.5", re.compile(r"gpt[-_ ]?3[-_. ]?5", re.I)))
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Place:
    """A file, or a split on the hub: its full name, its short one, and what finds it again."""

    name: str
    short: str
    source: SourceSettings


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One question with its good answer. `place` is file and row; `family` and `teacher` are "other" and "unknown"
    where nothing tells them."""

    id: str
    system: str
    question: str
    response: str
    family: str
    teacher: str
    place: str


def find_places(source: SourceSettings) -> list[Place]:
    """The files (or the one hub split) to read. Raises DataError where there is nothing."""
    name = source.dataset_name or ""
    names = [name]
    if _PATTERN.search(name) and not Path(name).exists():
        names = sorted(glob(name, recursive=True))
        if not names:
            raise DataError(f"No file fits the pattern --dataset_name {name}. It is relative to {Path.cwd()}.")
    tables = [table for one in names for table in _tables(one, source)]
    return [Place(full, short, source) for full, short, _ in tables]


def _tables(name: str, settings: SourceSettings) -> list[Table]:
    source = Source(
        name,
        split=settings.dataset_split,
        config=settings.dataset_config_name,
        revision=settings.dataset_revision,
        cache_dir=settings.cache_dir,
        token=settings.auth,
        streaming=True,
    )
    return find_tables(source)[0]


def read_rows(place: Place) -> Iterator[SourceRow | str]:
    """The rows of a place, one by one; in the place of a row that is no use, the reason.

    Raises DataError where a file cannot be read, or its first rows have no column for questions or answers.
    """
    looked, useful = 0, False
    for number, row in _numbered(place):
        if isinstance(row, RowProblem) and not number:  # of the file: nobody knows how many rows are missing
            raise DataError(f"{place.name}: {row} Repair it, or leave it out.")
        found = _row(row, number, place.short) if isinstance(row, Mapping) else UNREADABLE
        if not useful and isinstance(row, Mapping):
            looked += 1
            useful = all(_column(row, what) is not None for what in ("question", "response"))
            if looked == 100 and not useful:
                raise DataError(_unknown(place.name, row))
        yield found
    if looked and not useful:
        raise DataError(_unknown(place.name, row if isinstance(row, Mapping) else {}))


def unreadable(places: Iterable[Place], most: int) -> list[str]:
    """What is wrong with the first rows that cannot be read; reads no further than the last of them."""
    bad = (
        f"{place.name}{f' row {number}' if number else ''}: {row}"
        for place in places
        for number, row in _numbered(place)
        if isinstance(row, RowProblem)
    )
    return list(islice(bad, most))


def _numbered(place: Place) -> Iterable[tuple[int, Any]]:
    split = place.source.dataset_split
    if Path(place.name).is_file():  # its own table, whatever split its name tells
        split = "train"
    ((_, _, rows),) = _tables(place.name, _only(place.source, split))
    return rows


def _only(source: SourceSettings, split: str) -> SourceSettings:
    from dataclasses import replace

    return replace(source, dataset_split=split)


def _row(row: Mapping[str, Any], number: int, short: str) -> SourceRow | str:
    question, response = _asked(row), _text(row, "response")
    if not question.strip():
        return NO_QUESTION
    if not response.strip():
        return NO_ANSWER
    place = f"{short}:{number}"
    name = _text(row, "id") or place
    family = _FAMILY.match(name)
    told = _text(row, "teacher") or short
    teacher = next((label for label, pattern in _TEACHERS if pattern.search(told)), "unknown")
    label = family.group(1).lower() if family else "other"
    return SourceRow(name, _text(row, "system"), question, response, label, teacher, place)


def _asked(row: Mapping[str, Any]) -> str:
    """The question, with the `input` that the alpaca form has beside its instruction."""
    question, given = _text(row, "question"), row.get("input")
    if not isinstance(given, str) or given.strip() in question:
        return question
    return f"{question}\n\n{given}" if question.strip() else given


def _column(row: Mapping[str, Any], what: str) -> Any:
    return next((row[name] for name in SOURCE_COLUMNS[what] if row.get(name) is not None), None)


def _text(row: Mapping[str, Any], what: str) -> str:
    value = _column(row, what)
    return value if isinstance(value, str) else "" if value is None or what in ("question", "response") else str(value)


def _unknown(name: str, row: Mapping[str, Any]) -> str:
    needs = " and ".join(f"{what} ({', '.join(SOURCE_COLUMNS[what])})" for what in ("question", "response"))
    empty = [str(column) for column, value in row.items() if value is None]
    nothing = f" Of these, nothing (null) is in {', '.join(empty)}." if empty else ""
    return f"{name} has no columns for {needs}. It has: {', '.join(map(str, row))}.{nothing} Rename or fill them."
