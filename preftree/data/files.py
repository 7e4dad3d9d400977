"""Rows of local files: .jsonl, .json, .csv and .parquet.

Rows are numbered from 1: lines of a .jsonl, otherwise data rows (a CSV header is not counted). A reader yields
what is wrong with a row in the row's place and reads on, so that one pass names every bad row.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preftree.data.messages import RowProblem

Row = Mapping[str, Any]
Numbered = tuple[int, "Row | RowProblem"]
"""A row with its number, or what is wrong with it; number 0 stands for the whole file."""


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    # Bytes, because text mode would stop at the first line that is not UTF-8, and would also split a line at
    # the line separators that JSON texts may hold.
    with path.open("rb") as file:
        if foreign := _foreign(file.peek(4)) or _spread_out(file.peek(4096)):
            yield 0, foreign
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line, number)


_WIDE = "it is UTF-16 or UTF-32 text. Save the file as UTF-8."
_MAGIC = {
    b"\xff\xfe": _WIDE,
    b"\xfe\xff": _WIDE,
    b"\x1f\x8b": "it is compressed (gzip). Unpack it.",
    b"PK\x03\x04": "it is compressed (zip). Unpack it.",
    b"\x28\xb5\x2f\xfd": "it is compressed (zstd). Unpack it.",
    b"BZh": "it is compressed (bzip2). Unpack it.",
    b"PAR1": "it is a Parquet file. Name it .parquet.",
}


def _foreign(beginning: bytes) -> RowProblem | None:
    """What a file is by its first bytes, where it is no UTF-8 text at all."""
    said = next((said for magic, said in _MAGIC.items() if beginning.startswith(magic)), None)
    if said is None and b"\x00" in beginning[:4]:
        said = _WIDE
    return RowProblem(said) if said else None


def _spread_out(beginning: bytes) -> RowProblem | None:
    """Is it JSON, but one value over several lines?"""
    first, *more = beginning.split(b"\n", 2)
    if first.strip() in (b"{", b"[") and more and isinstance(_parsed(more[0], 2), RowProblem):
        return RowProblem(
            "its first line opens an object and does not close it. A .jsonl holds one object a line; "
            "name a file with one JSON value .json."
        )
    return None


def _parsed(line: bytes, number: int) -> Row | RowProblem:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return RowProblem(f"it is not UTF-8 text (byte {error.start + 1}). Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        hint = " Each object needs a line of its own." if error.msg == "Extra data" else ""
        return RowProblem(f"it is not JSON ({error.msg} at character {error.colno}).{hint}")
    except RecursionError:
        return RowProblem("it is nested too deeply to be read.")
    except ValueError as error:  # a number of more digits than Python converts
        return RowProblem(f"it cannot be read as JSON ({error}).")
    return _checked(row)


def _checked(row: Any) -> Row | RowProblem:
    if isinstance(row, Mapping):
        return row
    return RowProblem(f"it must be an object with named columns. Got {type(row).__name__} instead.")


def _read_json(path: Path) -> Iterator[Numbered]:
    """A list of objects, an object with one such list in it, or, as often happens, one object a line."""
    text = path.read_bytes()
    if not text.strip():
        return
    if foreign := _foreign(text):
        yield 0, foreign
        return
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not isinstance(_parsed(text.split(b"\n", 1)[0], 1), RowProblem):
            yield from _read_jsonl(path)
        else:
            yield 0, RowProblem(f"it is neither JSON nor one JSON object a line ({error}).")
        return
    if isinstance(value, Mapping):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], Mapping)]
        value = lists[0] if len(value) == len(lists) == 1 else [value]
    if not isinstance(value, list):
        yield 0, RowProblem(f"it must hold a list of objects. Got {type(value).__name__} instead.")
        return
    for number, row in enumerate(value, start=1):
        yield number, _checked(row)


def _read_csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long conversation
    with path.open("rb") as start:
        if foreign := _foreign(start.read(4)):
            yield 0, foreign
            return
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        number = 0
        try:
            header = next(reader, None)
            if wrong := _header_problem(header or []):
                yield 0, wrong
                return
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if header is None or len(cells) != len(header):
                    yield (
                        number,
                        RowProblem(f"it has {len(cells)} cells where the header has {len(header or ())}."),
                    )
                else:
                    yield number, dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            # The reader has lost its place. A fault of the file and not of one row: --fix would drop all that follows.
            yield (
                0,
                RowProblem(
                    f"its row {number + 1} cannot be read as CSV in UTF-8 ({error}), and where the rows behind it "
                    "begin cannot be told. Look for a quote that is not closed, or save the file as UTF-8."
                ),
            )


def _header_problem(header: Sequence[str]) -> RowProblem | None:
    """What is wrong with the names of columns: cells not told apart, or two under one name."""
    if len(header) == 1 and (other := next((sign for sign in ";\t|" if sign in header[0]), None)):
        return RowProblem(
            f"its header is one cell, {header[0]!r:.80}: cells are parted by {other!r}. Save it with commas."
        )
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        return RowProblem(
            f"it has several columns named {', '.join(f'`{name}`' for name in twice)}. Rename all but one."
        )
    return None


def _read_parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if wrong := _header_problem(file.schema_arrow.names):
                yield 0, wrong
                return
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield 0, RowProblem(f"it cannot be read as Parquet ({said}). Is it whole, and of that kind?")


def without_nulls(row: Row) -> Row:
    """A row of Arrow's without the keys that other objects of a column have and that it fills with null."""
    return {name: _without_nulls(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _opened(read: Callable[[Path], Iterator[Numbered]]) -> Callable[[Path], Iterator[Numbered]]:
    """The reader, with a file that the system does not give us as what is wrong with it."""

    def rows(path: Path) -> Iterator[Numbered]:
        try:
            yield from read(path)
        except OSError as error:
            yield 0, RowProblem(f"it cannot be read ({error.strerror or error}). Look at its permissions and its disk.")

    return rows


READERS: dict[str, Callable[[Path], Iterable[Numbered]]] = {
    ".jsonl": _opened(_read_jsonl),
    ".json": _opened(_read_json),
    ".csv": _opened(_read_csv),
    ".parquet": _opened(_read_parquet),
}
"""File ending -> reader of its rows. A reader yields what is wrong with a row in the row's place."""
