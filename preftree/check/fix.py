"""A cleaned copy of the data: rows dropped or repaired, each with its reason in a log. The input is never touched."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from preftree.check.read import Seen
from preftree.check.report import Finding, FixAction, Report, Rows
from preftree.config.check import CheckSettings
from preftree.data.files import READERS
from preftree.data.messages import RowProblem
from preftree.data.sources import Source, find_tables, refuse_inside
from preftree.errors import SettingsError
from preftree.io.atomic import atomic_file, atomic_path
from preftree.text.damage import repaired

LOG = ".log.jsonl"


@dataclass(frozen=True)
class FixPlan:
    """Which rows are dropped, each with the reason, and in which rows texts are repaired."""

    dropped: dict[int, str]
    repaired: frozenset[int]

    @classmethod
    def of(cls, report: Report, seen: Seen) -> FixPlan:
        """What the findings ask for.

        A row of several pairs is dropped only if none of its pairs is left. A record that was put together from two
        rows takes both along.
        """
        dropped: dict[int, str] = {}
        repaired: set[int] = set()
        for finding in report.findings:
            if finding.fix is FixAction.REPAIR:
                repaired.update(finding.rows.tolist())
            elif finding.fix is not FixAction.NONE:
                for row in _rows_to_drop(finding, seen).tolist():
                    dropped.setdefault(row, finding.what)
        for row, other in seen.other_rows.items():
            if row in dropped:
                dropped.setdefault(other, dropped[row])
            if row in repaired:
                repaired.add(other)
        return cls(dropped, frozenset(repaired - dropped.keys()))


def _rows_to_drop(finding: Finding, seen: Seen) -> Rows:
    if finding.fix is FixAction.DROP_WITHOUT_PAIR:
        return finding.rows[~np.isin(finding.rows, seen.pairs.row[seen.pairs.trainable])]
    if finding.unit == "pairs":  # a row of several pairs stays, as its other pairs may be sound
        rows, pairs = np.unique(seen.pairs.row, return_counts=True)
        return finding.rows[pairs[np.searchsorted(rows, finding.rows)] == 1]
    return finding.rows


def check_target(flag: str, target: str | None, source: str) -> None:
    """Refuse a target that exists, that cannot be made, or whose format is not that of the source.

    Raises SettingsError.
    """
    if target is None:
        return
    path = Path(target)
    if path.exists() or path.is_symlink():
        raise SettingsError(f"{flag} {target} exists already, and nothing is written over. Name a new one.")
    if not path.parent.is_dir():
        raise SettingsError(f"{flag} {target}: there is no folder {path.parent}. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise SettingsError(f"{flag} {target}: the folder {path.parent} may not be written. Name another place.")
    if flag != "--fix":
        return
    refuse_inside(flag, target, source)
    given = Path(source).expanduser()
    if not given.exists():
        raise SettingsError(f"--fix works on local files, and {source!r} is none: download it first.")
    if given.is_dir() and any(Path(table.name).is_dir() for table in find_tables(source)[0]):
        raise SettingsError(f"--fix writes files, and {source} was saved by `datasets`: save it as Parquet first.")
    if given.is_file() and path.suffix.lower() != given.suffix.lower():
        raise SettingsError(f"--fix writes the format that it reads: {target} must end in {given.suffix}.")
    if _log_of(path).exists():
        raise SettingsError(f"--fix: its log {_log_of(path)} exists already, and nothing is written over.")


def _log_of(target: Path) -> Path:
    return target.with_name(target.name + LOG)


def write_fixed(settings: CheckSettings, seen: Seen, plan: FixPlan, target: Path) -> list[str]:
    """Write the cleaned files and the log, each of which appears whole; returns what to tell about it."""
    tables, _ = find_tables(Source(settings.dataset_name or "", split=settings.split))
    starts = {short: start for start, short in seen.tables}
    one = Path(settings.dataset_name or "").expanduser().is_file()
    done = _Counts()
    with atomic_file(_log_of(target), "w") as log:
        for name, short, _ in tables:
            if short not in starts:
                continue  # of no known format, so not checked
            place = target if one else target / short
            decide = _Decider(plan, starts[short], short, log, done)
            with atomic_path(place) as partial:
                WRITERS[place.suffix.lower()](Path(name), partial, decide)
    counts = f"{done.kept} kept as they are, {done.repaired} repaired, {done.dropped.total()} dropped"
    said = [f"fixed      {target}: of its rows {counts}"]
    said += [f"           dropped {count}: {what}" for what, count in done.dropped.items()]
    return [*said, f"           what was done to which row: {_log_of(target)}"]


@dataclass
class _Counts:
    """What became of the rows; the dropped ones by reason."""

    kept: int = 0
    repaired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Decider:
    """Called with (place in the file from 0, row number, row), gives the row to write: the same object, a repaired
    one, or None. It counts what it decides, and logs every row that does not stay as it is."""

    plan: FixPlan
    start: int
    short: str
    log: IO[str]
    done: _Counts

    def __call__(self, place: int, number: int, row: Mapping[str, Any] | RowProblem) -> Mapping[str, Any] | None:
        why = self.plan.dropped.get(self.start + place)
        if isinstance(row, RowProblem) or why is not None:
            self.done.dropped[why or "rows that cannot be read"] += 1
            self._note(number, "dropped", str(row) if isinstance(row, RowProblem) else str(why))
            return None
        if self.start + place in self.plan.repaired and (better := _repaired(row)) != row:
            self.done.repaired += 1
            self._note(number, "repaired", "encoding undone, control characters removed")
            return better
        self.done.kept += 1
        return row

    def _note(self, number: int, did: str, why: str) -> None:
        json.dump({"row": f"{self.short}:{number}", "did": did, "why": why}, self.log)
        self.log.write("\n")


def _repaired(value: Any) -> Any:
    """The value with every text in it repaired."""
    if isinstance(value, str):
        return repaired(value)
    if isinstance(value, Mapping):
        return {key: _repaired(item) for key, item in value.items()}
    return [_repaired(item) for item in value] if isinstance(value, list) else value


def _rows(path: Path, decide: _Decider) -> Iterator[tuple[int, Mapping[str, Any], bool]]:
    """The rows to write: number, row, and whether it is as it was."""
    for place, (number, row) in enumerate(READERS[path.suffix.lower()](path)):
        better = decide(place, number, row)
        if better is not None:
            yield number, better, better is row


def _write_jsonl(path: Path, target: Path, decide: _Decider) -> None:
    """Rows that are as they were are copied byte for byte."""
    with path.open("rb") as lines, target.open("xb") as out:
        line, at = b"", 0
        for number, row, same in _rows(path, decide):
            while at < number:
                line, at = lines.readline(), at + 1
            out.write((line.rstrip(b"\r\n") if same else _json(row)) + b"\n")


def _write_json(path: Path, target: Path, decide: _Decider) -> None:
    with target.open("xb") as out:
        out.write(_json([row for _, row, _ in _rows(path, decide)], indent=1))


def _json(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; lone surrogates, which are not repaired in names of columns, stay the escapes they were."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def _write_csv(path: Path, target: Path, decide: _Decider) -> None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file))
    with target.open("x", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, header)
        writer.writeheader()
        writer.writerows(row for _, row, _ in _rows(path, decide))


def _write_parquet(path: Path, target: Path, decide: _Decider) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet  # type: ignore[import-untyped]

    schema = parquet.read_schema(path)
    with parquet.ParquetWriter(target, schema) as writer:
        for batch in _batches((row for _, row, _ in _rows(path, decide)), 1024):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _batches(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


WRITERS: dict[str, Callable[[Path, Path, _Decider], None]] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
"""File ending -> writer of the rows that are left."""
