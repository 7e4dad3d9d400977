"""The first pass over a source: numbers for each row instead of its text, so that millions of rows fit in memory.

A row that passes the cheap checks leaves 36 bytes: where it stands, a key of its question (for exact
duplicates), its priority (a hash with the seed: an order that depends neither on the files' order nor on who reads
them), and keys of what it is stratified by.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from preftree.config.prepare import SelectSettings
from preftree.prepare.source import Place, read_rows
from preftree.text.duplicates import exact_key
from preftree.text.refusals import is_refusal

REFUSAL = "the chosen answer is a refusal"
DUPLICATE = "the question is that of an earlier row"
#: The most common system prompts make a stratum each, the others share one. OpenOrca has 17 system prompts.
SYSTEMS = 32
#: Rows between two progress reports.
REPORT_EVERY = 5000


@dataclass(frozen=True)
class Scan:
    """The rows of one or more places that pass the cheap checks, in the order in which they were read.

    Arrays of equal length: `place` (index), `number` (position among all rows of the place), `key`, `priority`,
    `kind` (index into `kinds`, pairs of family and teacher), `system` (key of the system prompt). `rows` counts all
    rows read, `removed` those left out by reason, `digest` is a hash of everything that was read.
    """

    place: NDArray[np.uint32]
    number: NDArray[np.uint32]
    key: NDArray[np.uint64]
    priority: NDArray[np.uint64]
    kind: NDArray[np.uint32]
    system: NDArray[np.uint64]
    kinds: list[tuple[str, str]]
    rows: int
    removed: Counter[str]
    digest: str

    def __len__(self) -> int:
        return len(self.key)


ReadProgress = Callable[[int, int | None], None]
"""Called with (further rows read, None) while a place is read, and with (rows, rows) when all is read."""


def no_progress(rows: int, total: int | None) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Scanner:
    """Scans a place."""

    select: SelectSettings
    tell: ReadProgress = no_progress

    def __call__(self, place: Place) -> Scan:
        number, kind = array("I"), array("I")
        key, priority, system = array("Q"), array("Q"), array("Q")
        kinds: dict[tuple[str, str], int] = {}
        removed: Counter[str] = Counter()
        digest = xxhash.xxh3_128()
        position = -1
        for position, row in enumerate(read_rows(place)):
            if position % REPORT_EVERY == REPORT_EVERY - 1:
                self.tell(REPORT_EVERY, None)
            if isinstance(row, str):
                removed[row] += 1
                digest.update(row.encode())
                continue
            whole = exact_key(row.id, row.system, row.question, row.response)
            digest.update(whole.to_bytes(8, "little"))
            if not self.select.keep_refusals and is_refusal(row.response):
                removed[REFUSAL] += 1
                continue
            number.append(position)
            key.append(exact_key(" ".join(row.question.split())))
            priority.append(exact_key(str(self.select.seed), str(whole)))
            kind.append(kinds.setdefault((row.family, row.teacher), len(kinds)))
            system.append(exact_key(row.system))
        return Scan(
            np.zeros(len(number), np.uint32),
            np.frombuffer(number, np.uint32),
            np.frombuffer(key, np.uint64),
            np.frombuffer(priority, np.uint64),
            np.frombuffer(kind, np.uint32),
            np.frombuffer(system, np.uint64),
            list(kinds),
            position + 1,
            removed,
            digest.hexdigest(),
        )


def merge(scans: Sequence[Scan]) -> Scan:
    """The scans of all places, in the places' order, as one, without exact duplicates: the first of a kind stays."""
    kinds = sorted({kind for scan in scans for kind in scan.kinds})
    removed = sum((scan.removed for scan in scans), Counter())
    codes = [np.array([kinds.index(kind) for kind in scan.kinds] or [0], np.uint32)[scan.kind] for scan in scans]
    key = np.concatenate([scan.key for scan in scans])
    first = np.sort(np.unique(key, return_index=True)[1])
    if len(first) < len(key):
        removed[DUPLICATE] += len(key) - len(first)
    return Scan(
        np.repeat(np.arange(len(scans), dtype=np.uint32), [len(scan) for scan in scans])[first],
        np.concatenate([scan.number for scan in scans])[first],
        key[first],
        np.concatenate([scan.priority for scan in scans])[first],
        np.concatenate(codes)[first],
        np.concatenate([scan.system for scan in scans])[first],
        kinds,
        sum(scan.rows for scan in scans),
        removed,
        xxhash.xxh3_128_hexdigest(" ".join(scan.digest for scan in scans).encode()),
    )


def strata(scan: Scan, by: Sequence[str]) -> NDArray[np.int64]:
    """The stratum of each row, numbered from 0, by any of family, teacher and system."""
    columns = [np.zeros(len(scan), np.int64)]
    if "family" in by:
        names = sorted({family for family, _ in scan.kinds})
        columns.append(np.array([names.index(family) for family, _ in scan.kinds] or [0])[scan.kind])
    if "teacher" in by:
        names = sorted({teacher for _, teacher in scan.kinds})
        columns.append(np.array([names.index(teacher) for _, teacher in scan.kinds] or [0])[scan.kind])
    if "system" in by:
        columns.append(_common(scan.system))
    return np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _common(system: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A number for each of the commonest system prompts, and one for all others."""
    keys, inverse, counts = np.unique(system, return_inverse=True, return_counts=True)
    order = np.lexsort((keys, -counts))
    code = np.full(len(keys), SYSTEMS, np.int64)
    code[order[:SYSTEMS]] = np.arange(min(SYSTEMS, len(keys)))
    return code[inverse.reshape(-1)]
