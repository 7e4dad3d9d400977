"""Preference pairs from a local file, a folder of files, or a hub data set.

Local files are .jsonl, .json, .csv and .parquet; what their columns mean is decided in `formats.py`. A file
is read to its end before anything is said, so that one error names every bad row (`files.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from preftree.data.formats import FORMATS, NO_OPPOSITE, pair_by_prompt
from preftree.data.hub import hub_rows, may_be_hub_id
from preftree.data.local import local_tables, nothing_there
from preftree.data.record import LoadedPairs, PreferencePair, PreferenceRecord
from preftree.data.scan import Table, TableScan, unpaired
from preftree.errors import DataError, SettingsError


@dataclass(frozen=True)
class Source:
    """Where rows are read from.

    A local name wins over a hub id. In a folder (searched downwards) files whose name or folder tells a split
    ("test-00000.parquet", "validation/a.jsonl") belong to it and all others to train; a single file is taken
    as it is and has only the split train.
    """

    name: str
    """A local file, a local folder, or a hub id."""
    split: str = "train"
    """Which split; a hub data set also takes "train[:500]"."""
    config: str | None = None
    """Configuration of the hub data set, as all fields below for the hub only."""
    revision: str | None = None
    """Branch, tag or commit."""
    cache_dir: str | None = None
    """Where the downloaded files are kept."""
    token: str | bool | None = field(default=None, repr=False)
    """A hub token, or True for the stored one."""
    streaming: bool = False
    """Read row by row without downloading everything."""
    download_again: bool = False
    """Download even what was downloaded before."""

    @property
    def hub_options(self) -> dict[str, Any]:
        """The arguments of `datasets.load_dataset` that say which rows."""
        options = {
            "name": self.config,
            "split": self.split,
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "streaming": self.streaming,
        }
        return options | ({"download_mode": "force_redownload"} if self.download_again else {})


def load_pairs(
    source: Source | str, *, limit: int | None = None, pair_rule: str = "best_worst", min_margin: float = 0.0
) -> LoadedPairs:
    """The preference pairs of a source (or of the one with this name).

    Args:
        limit: take at most the first `limit` pairs; later rows are then not read.
        pair_rule: which pairs are made of each prompt's answers (`PreferenceRecord.pairs`), as is `min_margin`.

    Raises:
        DataError: with every problem found (each with its file and row); nothing is there under this name; no
            pair is left.
        SettingsError: a `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"The limit of pairs must be at least 1. Got {limit} instead.")
    tables, left_out = find_tables(source)
    loaded = _Loading(pair_rule, min_margin).load(tables, limit)
    loaded.left_out = left_out
    return loaded


def find_tables(source: Source | str) -> tuple[list[Table], list[str]]:
    """What there is to read, and the files left out as those of another split.

    Raises DataError where nothing is there. A hub data set is not looked for before its rows are asked for.
    """
    if isinstance(source, str):
        source = Source(source)
    path = Path(source.name).expanduser()
    if source.name and path.exists():
        return local_tables(path, source.split)
    if "://" in source.name:
        address = re.sub(r"//[^/@]*@", "//", source.name)  # without a password
        raise DataError(f"{address} is an address, and only files, folders and hub ids are read: download it.")
    if path.is_symlink():
        raise DataError(f"{path} is a link to {path.readlink()}, which is not there. Fix the link.")
    if not may_be_hub_id(source.name):
        raise DataError(nothing_there(path))
    return [Table(source.name, source.name, hub_rows(source.name, source.hub_options))], []


def refuse_inside(flag: str, output: str | None, dataset_name: str | None) -> None:
    """Raise SettingsError where what is written would lie in the folder that is read: it would be data next time."""
    if not output or not dataset_name:
        return
    folder, target = Path(dataset_name).expanduser(), Path(output).expanduser()
    if folder.is_dir() and target.resolve().is_relative_to(folder.resolve()):
        raise SettingsError(
            f"{flag} {output} lies in {dataset_name}, whose files are all data: what is written there would be read as"
            " data next time. Give a place outside it."
        )


class _Loading:
    """Records -> the pairs of one load, with counts of what gave none."""

    def __init__(self, rule: str, min_margin: float) -> None:
        self.rule, self.min_margin = rule, min_margin
        self.loaded = LoadedPairs()
        self.problems: list[str] = []
        self.formats: list[str] = []
        self.labelled: list[PreferenceRecord] = []

    def load(self, tables: Iterable[Table], limit: int | None) -> LoadedPairs:
        """All pairs of `tables`, or the first `limit`; raises DataError as `load_pairs` does."""
        loaded = self.loaded
        loaded.extend(islice(self._pairs(tables), limit))
        if self.problems:
            raise DataError(*self.problems)
        self._pair_labelled()
        if limit is not None:
            del loaded[limit:]
        loaded.format = ", ".join(dict.fromkeys(self.formats))
        if not loaded:
            why = "; ".join(f"{count} of them: {reason}" for reason, count in loaded.skipped.items())
            raise DataError(
                f"{', '.join(loaded.files)}: {loaded.rows} rows ({loaded.format}) were read and not one gives "
                f"a pair ({why}). Training needs, for the same prompt, one answer that is preferred to another."
            )
        return loaded

    def _pairs(self, tables: Iterable[Table]) -> Iterator[PreferencePair]:
        for table in tables:
            scan = TableScan(table, self.loaded.rows)
            self.loaded.files.append(scan.name)
            self.problems += scan.problems
            if scan.format is None:
                continue
            self.formats.append(scan.format)
            for record in self._records(scan):
                if FORMATS[scan.format].by_prompt:
                    self.labelled.append(record)
                else:
                    yield from self._pairs_of(record)

    def _records(self, scan: TableScan) -> Iterator[PreferenceRecord]:
        """The records of a table; what is wrong with the other rows goes to `problems`."""
        for scanned in scan:
            self.loaded.rows += scanned.row is not None
            if scanned.record is not None:
                self.loaded.notes.update(scanned.record.notes)
                yield scanned.record
            elif scanned.problem is not None:
                self.problems.append(scanned.problem)
            else:
                self.loaded.skipped[str(scanned.skipped)] += 1

    def _pairs_of(self, record: PreferenceRecord) -> list[PreferencePair]:
        pairs = record.pairs(self.rule, self.min_margin)
        if not pairs:
            self.loaded.skipped[unpaired(record, self.min_margin)] += 1
        return pairs

    def _pair_labelled(self) -> None:
        """Pairs from rows of one labelled answer each, put among the others by their rows."""
        paired, alone = pair_by_prompt(self.labelled)
        if alone:
            self.loaded.skipped[NO_OPPOSITE] += alone
        for record in paired:
            self.loaded.extend(self._pairs_of(record))
        if paired:
            self.loaded.sort(key=lambda pair: pair.row)
