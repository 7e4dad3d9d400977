"""The rows of one table, one by one, each as the record it makes or the reason why it makes none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

from preftree.data.fields import RowSkipped
from preftree.data.files import Numbered, Row
from preftree.data.formats import (
    FORMATS,
    NO_MARGIN,
    NO_PREFERENCE,
    NO_SCORES,
    column_kinds,
    explain_unknown,
    recognise,
)
from preftree.data.messages import RowProblem, json_column
from preftree.data.normalize import Normalizer
from preftree.data.record import PreferenceRecord

_PEEKED_ROWS = 100


class Table(NamedTuple):
    """A file or a split on the hub."""

    name: str
    """Its full name, for errors."""
    short: str
    """Its name in a pair's `source`."""
    rows: Iterable[Numbered]


@dataclass(frozen=True, slots=True)
class Scanned:
    """One row of a table: its number, the row itself, and the record it makes. Without a record, `problem` (what
    is wrong, with file and row) or `skipped` (why a sound row states no preference) says why."""

    number: int
    row: Row | None = None
    record: PreferenceRecord | None = None
    problem: str | None = None
    skipped: str | None = None


class TableScan:
    """The rows of one table, read one by one as its `format` says.

    The format is recognised from the first rows. Where there is none, `format` is None and `problems` says why;
    the rows are then not worth reading.
    """

    def __init__(self, table: Table, first_row: int = 0, peek: int = _PEEKED_ROWS) -> None:
        self.name, self.short, rows = table
        self.first_row = first_row
        iterator = iter(rows)
        head = list(islice(iterator, peek))
        self._normalize = Normalizer([row for _, row in head if not isinstance(row, RowProblem)])
        self.format, self.problems = _format_of(self.name, head, self._normalize)
        self._rows = chain(head, iterator)

    def __iter__(self) -> Iterator[Scanned]:
        """Every row; a record's `row` is its place among all sound rows, from `first_row` on."""
        if self.format is None:
            return
        position = self.first_row
        for number, row in self._rows:
            if isinstance(row, RowProblem):
                yield Scanned(number, problem=_placed(self.name, number, row))
                continue
            try:
                record = replace(self._record(row), source=f"{self.short}:{number}", row=position)
                yield Scanned(number, row, record)
            except RowProblem as problem:
                yield Scanned(number, row, problem=_placed(self.name, number, problem))
            except RecursionError:
                yield Scanned(number, row, problem=_placed(self.name, number, RowProblem("it is nested too deeply.")))
            except RowSkipped as skipped:
                yield Scanned(number, row, skipped=str(skipped))
            position += 1

    def _record(self, row: Row) -> PreferenceRecord:
        row, notes = self._normalize(row)
        record = FORMATS[str(self.format)].read(row)
        tools = record.tools or json_column(row.get("tools"), "tools", list)
        kwargs = json_column(row.get("chat_template_kwargs"), "chat_template_kwargs", dict)
        return replace(record, tools=tools, template_kwargs=kwargs, notes=notes) if tools or kwargs or notes else record


def unpaired(record: PreferenceRecord, min_margin: float) -> str:
    """Why a record makes no pair."""
    if min_margin <= 0:
        return NO_PREFERENCE
    return NO_MARGIN if record.scored else NO_SCORES


def _format_of(name: str, head: list[Numbered], normalize: Normalizer) -> tuple[str | None, list[str]]:
    """The format of a table from its first rows, or None with the reasons why there is none."""
    good = [row for _, row in head if not isinstance(row, RowProblem)]
    if not head:
        return None, [f"{name} is empty: it has no row. Give a file with one preference pair a row."]
    format_name = recognise(column_kinds([_plain(row, normalize) for row in good])) if good else None
    if format_name is not None:
        return format_name, []
    bad = [_placed(name, number, row) for number, row in head if isinstance(row, RowProblem)]
    damaged = [(number, problem) for number, row in head if (problem := _problem_of(row, normalize)) is not None]
    if damaged:  # rows in their plain form might have been of a known format
        bad.append(_placed(name, *damaged[0]))
    elif good:
        bad.append(f"{name}: {explain_unknown(dict.fromkeys(str(key) for row in good for key in row))}")
    return None, bad


def _plain(row: Row, normalize: Normalizer) -> Row:
    """The row in its plain form, or as it is where that fails: its turn to be told of comes later."""
    try:
        return normalize(row)[0]
    except (RowProblem, RecursionError):
        return row


def _problem_of(row: Row | RowProblem, normalize: Normalizer) -> RowProblem | None:
    """Why a row has no plain form; None where it has one, or was told of already."""
    if isinstance(row, RowProblem):
        return None
    try:
        normalize(row)
    except RowProblem as problem:
        return problem
    except RecursionError:
        return RowProblem("it is nested too deeply.")
    return None


def _placed(name: str, number: int, problem: RowProblem) -> str:
    return f"{name} row {number}: {problem}" if number else f"{name}: {problem}"
