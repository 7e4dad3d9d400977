"""One pass over a source that keeps numbers, not texts.

A row leaves 8 bytes behind (its number; 8 more for each check it hits) and a pair 45 (hashes of its texts, their
lengths), so that a million pairs fit into a fraction of a gigabyte. Of the texts only a random sample is kept.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from preftree.check.report import RowExample, Rows
from preftree.check.rows import row_hits, trainable
from preftree.data.formats import FORMATS, NO_OPPOSITE, NO_PREFERENCE, pair_by_prompt
from preftree.data.record import PreferencePair, PreferenceRecord
from preftree.data.scan import Scanned, Table, TableScan, unpaired
from preftree.errors import DataError
from preftree.text.duplicates import exact_key

BROKEN = "broken"
TIED = "score ties"
MISLABELLED = "scores that say the opposite of the columns"
#: Messages about broken rows that are kept.
MAX_PROBLEMS = 1000

PairHook = Callable[[int, PreferenceRecord, list[PreferencePair]], None]
"""Called with every record: its row, the record, its pairs."""


class Pairs:
    """What is remembered of the pairs, a column per value, in the order of reading."""

    def __init__(self) -> None:
        self._row = array("q")
        self._keys = {name: array("Q") for name in ("prompt", "chosen", "rejected")}
        self._lengths = {name: array("i") for name in ("prompt", "chosen", "rejected")}
        self._usable = array("b")

    def __len__(self) -> int:
        return len(self._row)

    def add(self, row: int, pair: PreferencePair) -> None:
        """Remember one pair of a row."""
        parts = {
            "prompt": pair.prompt_parts,
            "chosen": [pair.chosen, pair.chosen_keys],
            "rejected": [pair.rejected, pair.rejected_keys],
        }
        self._row.append(row)
        self._usable.append(trainable(pair))
        for name, texts in parts.items():
            self._keys[name].append(exact_key(*texts))
        self._lengths["prompt"].append(len(pair.system or "") + sum(len(turn.content) for turn in pair.turns))
        self._lengths["chosen"].append(len(pair.chosen))
        self._lengths["rejected"].append(len(pair.rejected))

    @property
    def row(self) -> Rows:
        """The row of each pair."""
        return np.frombuffer(self._row, np.int64) if self._row else np.empty(0, np.int64)

    @property
    def trainable(self) -> NDArray[np.bool_]:
        """Which pairs have two different answers to a prompt."""
        return np.frombuffer(self._usable, np.int8).astype(bool) if self._row else np.empty(0, bool)

    def key(self, name: str) -> NDArray[np.uint64]:
        """64-bit hashes of `prompt`, `chosen` or `rejected`."""
        return np.frombuffer(self._keys[name], np.uint64) if self._row else np.empty(0, np.uint64)

    def length(self, name: str) -> NDArray[np.int32]:
        """Characters of `prompt`, `chosen` or `rejected`."""
        return np.frombuffer(self._lengths[name], np.int32) if self._row else np.empty(0, np.int32)


@dataclass
class Seen:
    """What one pass has seen. Rows are counted from 0 over all files, broken ones included.

    `tables` are the files that were read, each with its first row; `unreadable` those that could not be, or not to
    their end. `problems` says why, and what is wrong with broken rows. `without_pair` has the rows that give none by
    reason, `read_as` those that were not read as they stand by what was done to them.
    """

    pairs: Pairs = field(default_factory=Pairs)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    hit_rows: dict[str, array[int]] = field(default_factory=dict)
    tables: list[tuple[int, str]] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    without_pair: dict[str, array[int]] = field(default_factory=dict)
    read_as: dict[str, array[int]] = field(default_factory=dict)
    other_rows: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    roles: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """How many rows were read, broken ones included."""
        return len(self.numbers)

    def located(self, rows: Iterable[int]) -> list[RowExample]:
        """The rows by file and number."""
        starts = [start for start, _ in self.tables]
        return [RowExample(self.tables[bisect_right(starts, row) - 1][1], self.numbers[row]) for row in rows]

    def missing(self, reason: str) -> Rows:
        """The rows that gave no pair for this reason."""
        return np.array(self.without_pair.get(reason, ()), np.int64)

    def hits(self, name: str) -> Rows:
        """The rows of which the row check `name` is true."""
        return np.array(self.hit_rows.get(name, ()), np.int64)

    def leave_out(self, reason: str, row: int) -> None:
        """Note that a row gives no pair."""
        self.without_pair.setdefault(reason, array("q")).append(row)


class Sample:
    """A random sample of pairs (reservoir sampling, Vitter's algorithm R), the same for the same seed."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seen = size, 0
        self.pairs: list[tuple[int, PreferencePair]] = []
        self._random = random.Random(seed)

    def add(self, row: int, pair: PreferencePair) -> None:
        """Offer one pair."""
        self.seen += 1
        if len(self.pairs) < self.size:
            self.pairs.append((row, pair))
        elif (place := self._random.randrange(self.seen)) < self.size:
            self.pairs[place] = (row, pair)


def read(
    tables: Sequence[Table],
    *,
    rule: str = "best_worst",
    min_margin: float = 0.0,
    limit: int | None = None,
    hooks: Sequence[PairHook] = (),
) -> Seen:
    """Read all rows once. `hooks` are called with every record; at most `limit` rows are read.

    Raises DataError where no file has a known format.
    """
    seen = Seen()
    labelled: list[PreferenceRecord] = []
    for table in tables:
        scan = TableScan(table)
        seen.files.append(scan.name)
        if scan.format is None:
            seen.unreadable.append(scan.short)
            seen.problems += scan.problems
            continue
        seen.formats.append(scan.format)
        start = seen.rows
        seen.tables.append((start, scan.short))
        for scanned in _limited(scan, None if limit is None else limit - start):
            if scanned.problem is not None and not scanned.number:  # of the file, not of a row in it
                seen.unreadable.append(scan.short)
                seen.problems.append(scanned.problem)
                continue
            row = seen.rows
            record = _take(seen, row, scanned)
            if record is None:
                continue
            if FORMATS[scan.format].by_prompt:
                labelled.append(replace(record, row=row))
            else:
                _measure(seen, record, row, rule, min_margin, hooks)
    if not seen.tables:
        raise DataError(*seen.problems)
    paired, _ = pair_by_prompt(labelled)
    for record in paired:
        _measure(seen, record, record.row, rule, min_margin, hooks)
        if record.other_row is not None:
            seen.other_rows[record.row] = record.other_row
    taken = {row for pair in seen.other_rows.items() for row in pair}
    for record in labelled:
        if record.row not in taken:
            seen.leave_out(NO_OPPOSITE, record.row)
            _note(seen, record, record.row, [], hooks)
    return seen


def _limited(scan: TableScan, limit: int | None) -> Iterator[Scanned]:
    for done, scanned in enumerate(scan):
        if limit is not None and done >= limit:
            return
        yield scanned


def _take(seen: Seen, row: int, scanned: Scanned) -> PreferenceRecord | None:
    """Note a row; its record, if it makes one."""
    seen.numbers.append(scanned.number)
    if scanned.problem is not None:
        seen.leave_out(BROKEN, row)
        if len(seen.problems) < MAX_PROBLEMS:
            seen.problems.append(scanned.problem)
    elif scanned.skipped is not None:
        seen.leave_out(scanned.skipped, row)
    for note in scanned.record.notes if scanned.record is not None else ():
        seen.read_as.setdefault(note, array("q")).append(row)
    return scanned.record


def _measure(
    seen: Seen, record: PreferenceRecord, row: int, rule: str, min_margin: float, hooks: Sequence[PairHook]
) -> None:
    pairs = record.pairs(rule, min_margin)
    if not pairs:
        seen.leave_out(_why_unpaired(record, min_margin), row)
    _note(seen, record, row, pairs, hooks)


def _note(
    seen: Seen, record: PreferenceRecord, row: int, pairs: list[PreferencePair], hooks: Sequence[PairHook]
) -> None:
    for pair in pairs:
        seen.pairs.add(row, pair)
    for name in row_hits(record, pairs):
        seen.hit_rows.setdefault(name, array("q")).append(row)
    for hook in hooks:
        hook(row, record, pairs)


def _why_unpaired(record: PreferenceRecord, min_margin: float) -> str:
    """The reason of `unpaired`, with ties told from scores that contradict the columns."""
    reason = unpaired(record, min_margin)
    if reason != NO_PREFERENCE or not record.scored:
        return reason
    scores = [response.score for response in record.responses]
    return TIED if len(set(scores)) == 1 else MISLABELLED
