"""Preference pairs from a local file, a folder of files, or a hub data set.

Local files are .jsonl, .json, .csv and .parquet; what their columns mean is decided in `formats.py`. A file
is read to its end before anything is said, so that one error names every bad row. Rows are numbered from 1:
lines of a .jsonl, otherwise data rows (a CSV header is not counted).
"""

from __future__ import annotations

import csv
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from preftree.data.formats import (
    FORMATS,
    NO_OPPOSITE,
    NO_PREFERENCE,
    Row,
    RowProblem,
    RowSkipped,
    column_kinds,
    explain_unknown,
    pair_by_prompt,
    recognise,
)
from preftree.data.record import LoadedPairs, PreferenceRecord
from preftree.errors import DataError, SettingsError, did_you_mean

__all__ = ["READERS", "LoadedPairs", "load_pairs"]

Numbered = tuple[int, "Row | RowProblem"]
"""A row with its number, or what is wrong with it; number 0 stands for the whole file."""
Table = tuple[str, str, Iterable[Numbered]]
"""A file or hub split: its full name for errors, its short name for `source`, its rows."""

_PEEKED_ROWS = 100
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")


def load_pairs(
    dataset_name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    streaming: bool = False,
    limit: int | None = None,
    overwrite_cache: bool = False,
) -> LoadedPairs:
    """The preference pairs of `dataset_name`, which is a local file, a local folder, or a hub id.

    A local name wins over a hub id. In a folder (searched downwards) files whose name or folder tells a split
    ("test-00000.parquet", "validation/a.jsonl") belong to it and all others to train; a single file is taken
    as it is and has only the split train. `limit` is the most pairs to take, the first ones; later rows
    are then not read. `config_name`, `revision`, `cache_dir`, `token`, `streaming` and `overwrite_cache` are
    meant for the hub, as `datasets.load_dataset` takes them; code from the hub is never run.

    Raises DataError with every problem found (each with its file and row), where nothing is there under this
    name, or where no pair is left; SettingsError for a `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"The limit of pairs must be at least 1. Got {limit} instead.")
    path = Path(dataset_name).expanduser()
    left_out: list[str] = []
    tables: Iterable[Table]
    if dataset_name and path.exists():
        tables, left_out = _local_tables(path, split)
    elif not _may_be_hub_id(dataset_name):
        raise DataError(_nothing_there(path))
    else:
        options = {"name": config_name, "revision": revision, "cache_dir": cache_dir, "token": token}
        if overwrite_cache:
            options["download_mode"] = "force_redownload"
        tables = [(dataset_name, dataset_name, _hub_rows(dataset_name, split, streaming, options))]
    loaded = _read_tables(tables, limit)
    loaded.left_out = left_out
    return loaded


# --- rows -> pairs --------------------------------------------------------------------------------


def _read_tables(tables: Iterable[Table], limit: int | None) -> LoadedPairs:
    loaded, problems, formats = LoadedPairs(), list[str](), list[str]()
    answers: list[PreferenceRecord] = []
    for name, short, rows in tables:
        loaded.files.append(name)
        iterator = iter(rows)
        head = list(islice(iterator, _PEEKED_ROWS))
        format_name, trouble = _format_of(name, head)
        problems += trouble
        if format_name is None:
            continue
        formats.append(format_name)
        records = _records(name, short, format_name, chain(head, iterator), loaded, problems)
        if FORMATS[format_name].by_prompt:
            answers += records
            continue
        for record in records:
            pairs = record.pairs()
            loaded.extend(pairs)
            if not pairs:
                loaded.skipped[NO_PREFERENCE] += 1
            if limit is not None and len(loaded) >= limit:
                break
        if limit is not None and len(loaded) >= limit:
            break
    if problems:
        raise DataError(*problems)
    _add_paired_answers(loaded, answers)
    if limit is not None:
        del loaded[limit:]
    loaded.format = ", ".join(dict.fromkeys(formats))
    if not loaded:
        why = "; ".join(f"{count} of them: {reason}" for reason, count in loaded.skipped.items())
        raise DataError(
            f"{', '.join(loaded.files)}: {loaded.rows} rows ({loaded.format}) were read and not one gives "
            f"a pair ({why}). Training needs, for the same prompt, one answer that is preferred to another."
        )
    return loaded


def _add_paired_answers(loaded: LoadedPairs, answers: list[PreferenceRecord]) -> None:
    """Pairs from rows of one labelled answer each, put among the others by their rows."""
    paired, alone = pair_by_prompt(answers)
    if alone:
        loaded.skipped[NO_OPPOSITE] += alone
    loaded.extend(pair for record in paired for pair in record.pairs())
    if paired:
        loaded.sort(key=lambda pair: pair.row)


def _format_of(name: str, head: list[Numbered]) -> tuple[str | None, list[str]]:
    """The format of a table from its first rows, or None with the reasons why there is none."""
    good = [row for _, row in head if not isinstance(row, RowProblem)]
    if not head:
        return None, [f"{name} is empty: it has no row. Give a file with one preference pair a row."]
    format_name = recognise(column_kinds(good)) if good else None
    if format_name is not None:
        return format_name, []
    bad = [_placed(name, number, row) for number, row in head if isinstance(row, RowProblem)]
    if good:
        bad.append(f"{name}: {explain_unknown(dict.fromkeys(str(key) for row in good for key in row))}")
    return None, bad


def _records(
    name: str,
    short: str,
    format_name: str,
    rows: Iterable[Numbered],
    loaded: LoadedPairs,
    problems: list[str],
) -> Iterator[PreferenceRecord]:
    """The sound rows as records with their place; what is wrong with the others goes to `problems`."""
    read = FORMATS[format_name].read
    for number, row in rows:
        if isinstance(row, RowProblem):
            problems.append(_placed(name, number, row))
            continue
        position, loaded.rows = loaded.rows, loaded.rows + 1
        try:
            yield replace(read(row), source=f"{short}:{number}", row=position)
        except RowProblem as problem:
            problems.append(_placed(name, number, problem))
        except RowSkipped as skipped:
            loaded.skipped[str(skipped)] += 1


def _placed(name: str, number: int, problem: RowProblem) -> str:
    return f"{name} row {number}: {problem}" if number else f"{name}: {problem}"


# --- local files ----------------------------------------------------------------------------------


def _local_tables(path: Path, split: str) -> tuple[list[Table], list[str]]:
    if path.is_dir():
        return _folder_tables(path, split)
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path} cannot be read: its ending is none of {', '.join(READERS)}. Convert it to one of them."
        )
    if _SPLITS.get(split, split) != "train":
        raise DataError(
            f"{path} is one file and has only the split train, not {split!r}. "
            f"Give a folder with files named after their split, or ask for train."
        )
    return [(str(path), path.name, READERS[path.suffix.lower()](path))], []


def _folder_tables(folder: Path, split: str) -> tuple[list[Table], list[str]]:
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder) for path in inside}
    files = [
        path
        for path in inside
        if path.suffix.lower() in READERS and not any(part.startswith(".") for part in names[path].parts)
    ]
    if not files:
        raise DataError(f"The folder {folder} holds no file that ends in {', '.join(READERS)}. Put the data there.")
    wanted = _SPLITS.get(split, split)
    taken = [path for path in files if _split_of(names[path]) == wanted]
    if not taken:
        there = ", ".join(sorted({_split_of(names[path]) for path in files}))
        raise DataError(f"The folder {folder} holds no file of the split {split!r}. It has: {there}.")
    tables = [(str(path), names[path].as_posix(), READERS[path.suffix.lower()](path)) for path in taken]
    return tables, [str(path) for path in files if path not in taken]


def _split_of(name: Path) -> str:
    words = re.findall(r"[a-z]+", " ".join((*name.parts[:-1], name.stem)).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    # Bytes, because text mode would stop at the first line that is not UTF-8, and would also split a line at
    # the line separators that JSON texts may hold.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line, number)


def _parsed(line: bytes, number: int) -> Row | RowProblem:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return RowProblem(f"it is not UTF-8 text (byte {error.start + 1}). Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return RowProblem(f"it is not JSON ({error.msg} at character {error.colno}).")
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
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
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
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        number = 0
        try:
            header = next(reader, None)
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
            # The reader has lost its place: what follows cannot be told apart.
            yield (
                number + 1,
                RowProblem(f"it cannot be read as CSV in UTF-8 ({error}); the rest was not read."),
            )


def _read_parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield 0, RowProblem(f"it cannot be read as Parquet ({said}). Is it whole, and of that kind?")


READERS: dict[str, Callable[[Path], Iterable[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""File ending -> reader of its rows. A reader yields what is wrong with a row in the row's place."""


def _nothing_there(path: Path) -> str:
    said = f"There is no file or folder {path}."
    parent = path.parent
    if not parent.is_dir():
        return f"{said} Its folder {parent} does not exist either. Check the path."
    names = [entry.name for entry in parent.iterdir()]
    return f"{said}{did_you_mean(path.name, names)} Check the path; it is relative to {Path.cwd()}."


# --- the hub --------------------------------------------------------------------------------------


def _may_be_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and name[0] not in ".-" and Path(name).suffix.lower() not in READERS


def _hub_rows(name: str, split: str, streaming: bool, options: dict[str, Any]) -> Iterator[Numbered]:
    import datasets  # here, because it takes seconds and local files do not need it

    try:
        with _offline_if_unreachable():
            rows = datasets.load_dataset(name, split=split, streaming=streaming, **options)
        yield from enumerate(rows, start=1)
    except Exception as error:
        # The library raises a dozen kinds of error (its own, HTTP, OS, value errors), each of which means
        # that this name, configuration, split or revision could not be had from here.
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name!r} could not be loaded. Looked for a file or folder: {_nothing_there(Path(name))} "
            f"Looked on the hub, split {split!r}: {type(error).__name__}: {said[:400]} "
            f"Without a network, give --dataset_name a local file ({', '.join(READERS)}) or a folder of them."
        ) from error


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Switches the hub client offline while its host has no address: it then looks in its cache and fails at
    once, where it would first retry for half a minute. Behind a proxy the name need not resolve from here."""
    import datasets
    from huggingface_hub import constants

    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    host = urlsplit(constants.ENDPOINT).hostname or "huggingface.co"
    if proxied or _resolves(host):
        yield
        return
    kept = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = kept


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
