"""A cleaned copy of the data: rows dropped or mended, each with its reason in a log. The input is never touched."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preftree.check.read import Seen
from preftree.check.report import Report, Rows
from preftree.config.check import CheckSettings
from preftree.data.fields import RowProblem
from preftree.data.files import READERS
from preftree.data.sources import find_tables, refuse_inside
from preftree.errors import SettingsError
from preftree.text.damage import repaired

LOG = ".log.jsonl"


@dataclass(frozen=True)
class Fix:
    """Row -> why it is dropped, and the rows whose texts are mended."""

    dropped: dict[int, str]
    mended: frozenset[int]

    @classmethod
    def of(cls, report: Report, seen: Seen) -> Fix:
        """What the findings ask for.

        A row of several pairs is dropped only if none of its pairs is left; a record that was put together from two
        rows takes both along.
        """
        left = _rows_left(seen)
        dropped: dict[int, str] = {}
        mended: set[int] = set()
        for finding in report.findings:
            rows = finding.rows
            if finding.fix.startswith("dropped"):
                if "no pair is left" in finding.fix:
                    rows = rows[~np.isin(rows, left)]
                elif finding.unit == "pairs":
                    rows = _all_pairs_in(rows, finding.count, seen)
                for row in rows.tolist():
                    dropped.setdefault(row, finding.what)
            elif finding.fix:
                mended.update(rows.tolist())
        for row, other in seen.other_rows.items():
            if row in dropped:
                dropped.setdefault(other, dropped[row])
            if row in mended:
                mended.add(other)
        return cls(dropped, frozenset(mended - dropped.keys()))


def _rows_left(seen: Seen) -> Rows:
    """Rows with a usable pair."""
    return np.unique(seen.pairs.row[seen.pairs.usable])


def _all_pairs_in(rows: Rows, pairs: int, seen: Seen) -> Rows:
    """Those of `rows` that have one pair; rows of several pairs stay, as their other pairs may be sound."""
    there, counts = np.unique(seen.pairs.row, return_counts=True)
    return rows[counts[np.searchsorted(there, rows)] == 1]


def check_target(flag: str, target: str | None, source: str) -> None:
    """Refuse to write over anything, or beside the point.

    Raises SettingsError.
    """
    if target is None:
        return
    path = Path(target)
    if path.exists() or path.is_symlink():
        raise SettingsError(f"{flag} {target} exists already, and nothing is written over. Name a new one.")
    if not path.parent.is_dir():
        raise SettingsError(f"{flag} {target}: there is no folder {path.parent}. Make it first.")
    if flag != "--fix":
        return
    refuse_inside(flag, target, source)
    given = Path(source).expanduser()
    if not given.exists():
        raise SettingsError(f"--fix works on local files, and {source!r} is none: download it first.")
    if given.is_file() and path.suffix.lower() != given.suffix.lower():
        raise SettingsError(f"--fix writes the format that it reads: {target} must end in {given.suffix}.")
    if _log_of(path).exists():
        raise SettingsError(f"--fix: its log {_log_of(path)} exists already, and nothing is written over.")


def _log_of(target: Path) -> Path:
    return target.with_name(target.name + LOG)


def write_fixed(settings: CheckSettings, seen: Seen, fix: Fix, target: Path) -> list[str]:
    """Write the cleaned files and the log; returns what to tell about it.

    Every file is written beside its place and renamed when whole.
    """
    tables, _ = find_tables(settings.dataset_name or "", split=settings.split)
    starts = {short: start for start, short in seen.tables}
    one = Path(settings.dataset_name or "").expanduser().is_file()
    done: Counter[str] = Counter()
    with _log_of(target).open("x", encoding="utf-8") as log:
        for name, short, _ in tables:
            if short not in starts:
                continue  # of no known format, so not checked
            place = target if one else target / short
            place.parent.mkdir(parents=True, exist_ok=True)
            half = place.with_name(place.name + ".partial")
            decide = _decider(fix, starts[short], short, log, done)
            WRITERS[place.suffix.lower()](Path(name), half, decide)
            half.rename(place)
    dropped = {what: count for what, count in done.items() if what not in ("kept", "mended")}
    counts = f"{done['kept']} kept as they are, {done['mended']} mended, {sum(dropped.values())} dropped"
    said = [f"fixed      {target}: of its rows {counts}"]
    said += [f"           dropped {count}: {what}" for what, count in dropped.items()]
    return [*said, f"           what was done to which row: {_log_of(target)}"]


Decide = Callable[[int, int, "Mapping[str, Any] | RowProblem"], "Mapping[str, Any] | None"]
"""(place in the file from 0, row number, row) -> the row to write: the same object, a mended one, or None."""


def _decider(fix: Fix, start: int, short: str, log: io.TextIOBase, done: Counter[str]) -> Decide:
    def note(number: int, did: str, why: str) -> None:
        json.dump({"row": f"{short}:{number}", "did": did, "why": why}, log)
        log.write("\n")

    def decide(place: int, number: int, row: Mapping[str, Any] | RowProblem) -> Mapping[str, Any] | None:
        why = fix.dropped.get(start + place)
        if isinstance(row, RowProblem) or why is not None:
            done[why or "rows that cannot be read"] += 1
            note(number, "dropped", str(row) if isinstance(row, RowProblem) else str(why))
            return None
        if start + place in fix.mended and (better := _mended(row)) != row:
            done["mended"] += 1
            note(number, "mended", "encoding undone, control characters removed")
            return better
        done["kept"] += 1
        return row

    return decide


def _mended(value: Any) -> Any:
    """The value with every text in it repaired."""
    if isinstance(value, str):
        return repaired(value)
    if isinstance(value, Mapping):
        return {key: _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, list) else value


def _rows(path: Path, decide: Decide) -> Iterator[tuple[int, Mapping[str, Any], bool]]:
    """The rows to write: number, row, and whether it is as it was."""
    for place, (number, row) in enumerate(READERS[path.suffix.lower()](path)):
        better = decide(place, number, row)
        if better is not None:
            yield number, better, better is row


def _write_jsonl(path: Path, target: Path, decide: Decide) -> None:
    """Rows that are as they were are copied byte for byte."""
    with path.open("rb") as lines, target.open("xb") as out:
        line, at = b"", 0
        for number, row, same in _rows(path, decide):
            while at < number:
                line, at = lines.readline(), at + 1
            out.write((line.rstrip(b"\r\n") if same else _json(row)) + b"\n")


def _write_json(path: Path, target: Path, decide: Decide) -> None:
    with target.open("xb") as out:
        out.write(_json([row for _, row, _ in _rows(path, decide)], indent=1))


def _json(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; halves of characters, which are not mended in names of columns, stay the escapes they were."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def _write_csv(path: Path, target: Path, decide: Decide) -> None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file))
    with target.open("x", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, header)
        writer.writeheader()
        writer.writerows(row for _, row, _ in _rows(path, decide))


def _write_parquet(path: Path, target: Path, decide: Decide) -> None:
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


WRITERS: dict[str, Callable[[Path, Path, Decide], None]] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
"""File ending -> writer of the rows that are left."""
