"""Preference pairs from a local file, a folder of files, or a hub data set.

Local files are .jsonl, .json, .csv and .parquet; what their columns mean is decided in `formats.py`. A file
is read to its end before anything is said, so that one error names every bad row (`files.py`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from preftree.data.fields import Row, RowProblem, RowSkipped
from preftree.data.files import READERS, Numbered
from preftree.data.formats import (
    FORMATS,
    NO_MARGIN,
    NO_OPPOSITE,
    NO_PREFERENCE,
    NO_SCORES,
    column_kinds,
    explain_unknown,
    pair_by_prompt,
    recognise,
)
from preftree.data.record import LoadedPairs, PreferenceRecord
from preftree.errors import DataError, SettingsError, did_you_mean

__all__ = ["READERS", "LoadedPairs", "Scanned", "TableScan", "find_tables", "load_pairs", "unpaired"]

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
    pair_rule: str = "best_worst",
    min_margin: float = 0.0,
) -> LoadedPairs:
    """The preference pairs of `dataset_name`, which is a local file, a local folder, or a hub id.

    A local name wins over a hub id. In a folder (searched downwards) files whose name or folder tells a split
    ("test-00000.parquet", "validation/a.jsonl") belong to it and all others to train; a single file is taken
    as it is and has only the split train. `limit` is the most pairs to take, the first ones; later rows
    are then not read. `config_name`, `revision`, `cache_dir`, `token`, `streaming` and `overwrite_cache` are
    meant for the hub, as `datasets.load_dataset` takes them; code from the hub is never run. `pair_rule` and
    `min_margin` say which pairs are made of each prompt's answers (`PreferenceRecord.pairs`).

    Raises DataError with every problem found (each with its file and row), where nothing is there under this
    name, or where no pair is left; SettingsError for a `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"The limit of pairs must be at least 1. Got {limit} instead.")
    tables, left_out = find_tables(
        dataset_name,
        config_name=config_name,
        split=split,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        streaming=streaming,
        overwrite_cache=overwrite_cache,
    )
    loaded = _read_tables(tables, limit, pair_rule, min_margin)
    loaded.left_out = left_out
    return loaded


def find_tables(
    dataset_name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    streaming: bool = False,
    overwrite_cache: bool = False,
) -> tuple[list[Table], list[str]]:
    """What there is to read under a name, and the files left out as those of another split; see `load_pairs`.

    Raises DataError where nothing is there. A hub data set is not looked for before its rows are asked for.
    """
    path = Path(dataset_name).expanduser()
    if dataset_name and path.exists():
        return _local_tables(path, split)
    if "://" in dataset_name:
        raise DataError(f"{dataset_name} is an address, and only files, folders and hub ids are read: download it.")
    if path.is_symlink():
        raise DataError(f"{path} is a link to {path.readlink()}, which is not there. Mend the link.")
    if not _may_be_hub_id(dataset_name):
        raise DataError(_nothing_there(path))
    options = {"name": config_name, "revision": revision, "cache_dir": cache_dir, "token": token}
    if overwrite_cache:
        options["download_mode"] = "force_redownload"
    return [(dataset_name, dataset_name, _hub_rows(dataset_name, split, streaming, options))], []


def refuse_inside(flag: str, output: str | None, dataset_name: str | None) -> None:
    """Raise SettingsError where what is written would lie in the folder that is read: it would be data next time."""
    if not output or not dataset_name:
        return
    source, target = Path(dataset_name).expanduser(), Path(output).expanduser()
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise SettingsError(
            f"{flag} {output} lies in {dataset_name}, whose files are all data: what is written there would be read as"
            " data next time. Give a place outside it."
        )


# --- rows -> records ------------------------------------------------------------------------------


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

    def __init__(self, table: Table, first_row: int = 0) -> None:
        self.name, self.short, rows = table
        self.first_row = first_row
        iterator = iter(rows)
        head = list(islice(iterator, _PEEKED_ROWS))
        self.format, self.problems = _format_of(self.name, head)
        self._rows = chain(head, iterator)

    def __iter__(self) -> Iterator[Scanned]:
        """Every row; a record's `row` is its place among all sound rows, from `first_row` on."""
        if self.format is None:
            return
        read = FORMATS[self.format].read
        position = self.first_row
        for number, row in self._rows:
            if isinstance(row, RowProblem):
                yield Scanned(number, problem=_placed(self.name, number, row))
                continue
            try:
                record = replace(read(row), source=f"{self.short}:{number}", row=position)
                yield Scanned(number, row, record)
            except RowProblem as problem:
                yield Scanned(number, row, problem=_placed(self.name, number, problem))
            except RowSkipped as skipped:
                yield Scanned(number, row, skipped=str(skipped))
            position += 1


def unpaired(record: PreferenceRecord, min_margin: float) -> str:
    """Why a record makes no pair."""
    if min_margin <= 0:
        return NO_PREFERENCE
    return NO_MARGIN if record.scored else NO_SCORES


def _read_tables(tables: Iterable[Table], limit: int | None, rule: str, min_margin: float) -> LoadedPairs:
    loaded, problems, formats = LoadedPairs(), list[str](), list[str]()
    answers: list[PreferenceRecord] = []
    for table in tables:
        scan = TableScan(table, loaded.rows)
        loaded.files.append(scan.name)
        problems += scan.problems
        if scan.format is None:
            continue
        formats.append(scan.format)
        for record in _records(scan, loaded, problems):
            if FORMATS[scan.format].by_prompt:
                answers.append(record)
                continue
            pairs = record.pairs(rule, min_margin)
            loaded.extend(pairs)
            if not pairs:
                loaded.skipped[unpaired(record, min_margin)] += 1
            if limit is not None and len(loaded) >= limit:
                break
        if limit is not None and len(loaded) >= limit:
            break
    if problems:
        raise DataError(*problems)
    _add_paired_answers(loaded, answers, rule, min_margin)
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


def _records(scan: TableScan, loaded: LoadedPairs, problems: list[str]) -> Iterator[PreferenceRecord]:
    """The records of a table; what is wrong with the other rows goes to `problems`."""
    for scanned in scan:
        loaded.rows += scanned.row is not None
        if scanned.record is not None:
            yield scanned.record
        elif scanned.problem is not None:
            problems.append(scanned.problem)
        else:
            loaded.skipped[str(scanned.skipped)] += 1


def _add_paired_answers(loaded: LoadedPairs, answers: list[PreferenceRecord], rule: str, min_margin: float) -> None:
    """Pairs from rows of one labelled answer each, put among the others by their rows."""
    paired, alone = pair_by_prompt(answers)
    if alone:
        loaded.skipped[NO_OPPOSITE] += alone
    for record in paired:
        pairs = record.pairs(rule, min_margin)
        loaded.extend(pairs)
        if not pairs:
            loaded.skipped[unpaired(record, min_margin)] += 1
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
