"""Preference pairs from rows in memory or from a stream: `datasets.Dataset`, `IterableDataset`, lists of dicts.

The rows are read as those of a file are, by the same formats. Rows of token ids (`prompt_ids`, `chosen_ids`,
`rejected_ids`) are taken as they stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from preftree.data.encode import BATCH, EncodedPair, PairEncoder
from preftree.data.files import Numbered, without_nulls
from preftree.data.formats import FORMATS, NO_OPPOSITE, pair_by_prompt
from preftree.data.messages import RowProblem, found
from preftree.data.record import PreferencePair, PreferenceRecord
from preftree.data.scan import Table, TableScan, unpaired
from preftree.errors import DataError

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
TOKEN_IDS = "token ids"
"""The format of rows that hold `IDS`."""

# Rows that decide the format of a stream: few, as no more is to be read than what is needed.
_PEEKED_ROWS = 8


def pairs_from_rows(
    rows: Iterable[Mapping[str, Any]], *, name: str = "rows", pair_rule: str = "best_worst", min_margin: float = 0.0
) -> RowPairs:
    """The preference pairs of `rows`, read when they are asked for.

    Args:
        rows: dicts, one per row; iterated anew for each pass over the pairs.
        name: what messages call them, such as "train_dataset".
        pair_rule: which pairs are made of each prompt's answers (`PreferenceRecord.pairs`), as is `min_margin`.
    """
    return RowPairs(rows, name, pair_rule, min_margin)


class RowPairs(Iterable["PreferencePair | EncodedPair"]):
    """The pairs of rows. Iterating reads them one by one and raises DataError at the first row that cannot be read.

    After a pass, `format`, `rows` (how many were read), `skipped` (reason -> rows that gave no pair) and `notes` (how
    rows were read -> how many) tell about it, as those of `LoadedPairs` do.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], name: str, pair_rule: str, min_margin: float) -> None:
        self._source, self.name = rows, name
        self._rule, self._min_margin = pair_rule, min_margin
        self._reset()

    def __iter__(self) -> Iterator[PreferencePair | EncodedPair]:
        for item in self._pass():
            if isinstance(item, str):
                raise DataError(item)
            yield item

    def load(self) -> list[PreferencePair | EncodedPair]:
        """All pairs. Raises DataError with every problem found, or where there is no pair."""
        items = list(self._pass())
        if problems := [item for item in items if isinstance(item, str)]:
            raise DataError(*problems)
        if not items:
            why = "; ".join(f"{count} of them: {reason}" for reason, count in self.skipped.items())
            raise DataError(
                f"{self.name}: {self.rows} rows ({self.format}) were read and not one gives a pair ({why})."
            )
        return [item for item in items if not isinstance(item, str)]

    def _reset(self) -> None:
        self.format, self.rows = "", 0
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def _pass(self) -> Iterator[PreferencePair | EncodedPair | str]:
        """Every pair, and in the place of a row that cannot be read what is wrong with it."""
        self._reset()
        numbered = self._numbered()
        first = next(numbered, None)
        if first is not None and isinstance(first[1], Mapping) and all(name in first[1] for name in IDS):
            self.format = TOKEN_IDS
            yield from self._token_ids(_again(first, numbered))
            return
        rows = _again(first, numbered) if first is not None else iter(())
        scan = TableScan(Table(self.name, self.name, rows), peek=_PEEKED_ROWS)
        yield from scan.problems
        self.format = scan.format or ""
        alone: dict[Hashable, list[PreferenceRecord]] = {}
        for scanned in scan:
            self.rows += 1
            if scanned.problem is not None:
                yield scanned.problem
            elif scanned.record is None:
                self.skipped[str(scanned.skipped)] += 1
            else:
                self.notes.update(scanned.record.notes)
                by_prompt = FORMATS[self.format].by_prompt
                record = _matched(scanned.record, alone) if by_prompt else scanned.record
                yield from self._pairs_of(record) if record is not None else ()
        if left := sum(map(len, alone.values())):
            self.skipped[NO_OPPOSITE] += left

    def _numbered(self) -> Iterator[Numbered]:
        # Arrow fills the keys that an object lacks and others have with null.
        arrow = hasattr(self._source, "features")
        row: Any
        for number, row in enumerate(self._source, start=1):
            if isinstance(row, Mapping):
                yield number, without_nulls(row) if arrow else row
            else:
                yield number, RowProblem(f"it must be an object with named columns. Got {found(row)} instead.")

    def _pairs_of(self, record: PreferenceRecord) -> list[PreferencePair]:
        pairs = record.pairs(self._rule, self._min_margin)
        if not pairs:
            self.skipped[unpaired(record, self._min_margin)] += 1
        return pairs

    def _token_ids(self, rows: Iterator[Numbered]) -> Iterator[EncodedPair | str]:
        for number, row in rows:
            self.rows += 1
            try:
                if isinstance(row, RowProblem):
                    raise row
                prompt, chosen, rejected = (token_ids(row, name) for name in IDS)
            except RowProblem as problem:
                yield f"{self.name} row {number}: {problem}"
                continue
            yield EncodedPair(prompt, chosen, rejected, number - 1, f"{self.name}:{number}")


def encode_stream(
    pairs: Iterable[PreferencePair | EncodedPair], encoder: PairEncoder, batch: int = BATCH
) -> Iterator[EncodedPair]:
    """The encoded pairs of a stream, read `batch` by `batch`; `encoder.report` counts those that were dropped."""
    iterator = iter(pairs)
    while waiting := list(islice(iterator, batch)):
        yield from (fate.encoded for fate in encoder.encode(waiting) if fate.encoded is not None)


def _again(first: Numbered, rest: Iterator[Numbered]) -> Iterator[Numbered]:
    yield first
    yield from rest


def _matched(record: PreferenceRecord, alone: dict[Hashable, list[PreferenceRecord]]) -> PreferenceRecord | None:
    """The labelled answer with the earliest one of the opposite label to the same prompt, once there are both."""
    key = (record.system, record.turns, record.tools, record.template_kwargs)
    waiting = alone.setdefault(key, [])
    if not waiting or waiting[0].responses[0].rank == record.responses[0].rank:
        waiting.append(record)
        return None
    ((pair,), _) = pair_by_prompt([waiting.pop(0), record])
    if not waiting:
        del alone[key]
    return pair


def token_ids(row: Mapping[str, Any], column: str) -> tuple[int, ...]:
    """A column of token ids. Raises RowProblem where it holds anything else."""
    value: Any = row.get(column)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or not all(type(item) is int and item >= 0 for item in value):
        raise RowProblem(f"column `{column}` must be a list of token ids. Got {found(value)} instead.")
    return tuple(value)
