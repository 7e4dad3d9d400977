"""What a check says: findings with their level, facts, histograms; plain data that every view shows.

SPOILS   training would refuse the data, or learn from it what nobody wants: exit code 1
NOTE     worth knowing; training copes with it
FINE     looked for and not found
SKIPPED  not looked for, and why
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from preftree.check.trained import TrainedPair

SPOILS, NOTE, FINE, SKIPPED = "spoils", "note", "fine", "skipped"
LEVELS = (SPOILS, NOTE, FINE, SKIPPED)

Rows = NDArray[np.int64]
"""Places of rows in the order of reading, from 0."""


class FixAction(StrEnum):
    """What --fix does with the rows of a finding."""

    NONE = ""
    DROP = "drop"
    DROP_WITHOUT_PAIR = "drop_without_pair"
    """Drop a row only if none of its pairs can be trained on."""
    REPAIR = "repair"
    """Keep the row, with its texts repaired."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What is looked for, and how bad it is.

    `what` names it, `why` says what it does to training and what to do. At a share of `note` it is worth knowing, at a
    share of `spoils` (None: never) it spoils training. `fix` is what --fix does with such rows.
    """

    what: str
    why: str
    spoils: float | None = None
    note: float = 0.0
    fix: FixAction = FixAction.NONE

    def level(self, share: float) -> str:
        """The level of a finding of this share (0 to 1)."""
        if share <= 0:
            return FINE
        if self.spoils is not None and share >= self.spoils:
            return SPOILS
        return NOTE if share >= self.note else FINE


@dataclass(slots=True)
class RowExample:
    """A row as people find it: file, number in it, and a few words of its text, "" where it was not read again."""

    file: str
    number: int
    text: str = ""

    @property
    def place(self) -> str:
        """Name of the row: "pairs.jsonl:12"."""
        return f"{self.file}:{self.number}"


@dataclass(slots=True)
class Finding:
    """How much of one measure was found.

    `count` of `total` `unit`s; `rows` are all rows concerned and `examples` the first of them for people. `detail` is a
    sentence of its own, `sampled` is the size of the random sample that was looked at, None where all were.
    """

    key: str
    level: str
    what: str
    why: str
    count: int = 0
    total: int = 0
    unit: str = "rows"
    detail: str = ""
    fix: FixAction = FixAction.NONE
    sampled: int | None = None
    examples: list[RowExample] = field(default_factory=list)
    rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def places(self) -> list[str]:
        """The names of the first rows."""
        return [example.place for example in self.examples]

    @property
    def share(self) -> float:
        """`count` as a share of `total`, 0 to 1."""
        return self.count / self.total if self.total else 0.0


def make_finding(key: str, measure: Measure, count: int, total: int, rows: Rows | None = None, **more: Any) -> Finding:
    """A finding, judged by the limits of its measure; not looked for, where there was nothing to look at."""
    kept = np.unique(rows) if rows is not None else np.empty(0, np.int64)
    finding = Finding(key, FINE, measure.what, measure.why, count, total, fix=measure.fix, rows=kept, **more)
    if total:
        finding.level = measure.level(finding.share)
    else:  # "not found" would be a claim about nothing
        finding.level, finding.why = SKIPPED, "there is nothing to look at"
    return finding


@dataclass(slots=True)
class Histogram:
    """Counts of several series in common bins: `edges` has one number more than each list of `counts`."""

    title: str
    unit: str
    edges: list[float]
    counts: dict[str, list[int]]


def histogram(title: str, unit: str, series: dict[str, NDArray[np.int32]], bins: int = 40) -> Histogram:
    """Counts in at most `bins` common bins with round edges, from the 1st (or 0) to the 99th percentile.

    The outermost bins also hold what lies beyond them.
    """
    values = np.concatenate(list(series.values()))
    low, high = min(float(np.quantile(values, 0.01)), 0.0), max(float(np.quantile(values, 0.99)), 1.0)
    width = _round_up((high - low) / (bins - 2))
    edges = np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width
    counts = {
        name: np.histogram(np.clip(found, edges[0], edges[-1]), edges)[0].tolist() for name, found in series.items()
    }
    return Histogram(title, unit, edges.tolist(), counts)


def _round_up(width: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    power = 10.0 ** np.floor(np.log10(max(width, 1.0)))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= width))


@dataclass(slots=True)
class SampleRow:
    """A pair of the source as a reader of the report sees it."""

    place: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(slots=True)
class Report:
    """Everything a check found out about one source.

    `facts` are numbers by name, in the order in which they are shown. `problems` are the messages about files and rows
    that cannot be read, the first thousand of them. `tokenized` is how many of the pairs were seen under the tokenizer
    and its chat template. `samples` are a few pairs, `trained` the first pairs as they are trained on.
    """

    source: str
    files: list[str]
    left_out: list[str]
    formats: list[str]
    rows: int
    pairs: int
    settings: dict[str, Any]
    findings: list[Finding]
    facts: dict[str, Any]
    histograms: list[Histogram]
    notes: list[str]
    problems: list[str]
    tokenized: int = 0
    samples: list[SampleRow] = field(default_factory=list)
    trained: list[TrainedPair] = field(default_factory=list)
    date: str = ""
    seconds: float = 0.0

    def of(self, *levels: str) -> list[Finding]:
        """The findings of these levels, the largest share first within a level."""
        return sorted(
            (finding for finding in self.findings if finding.level in levels),
            key=lambda finding: (LEVELS.index(finding.level), -finding.share),
        )

    def skipped(self) -> dict[str, list[str]]:
        """Why something was not looked for -> what."""
        whys: dict[str, list[str]] = {}
        for finding in self.of(SKIPPED):
            whys.setdefault(finding.why, []).append(finding.what)
        return whys

    @property
    def spoiled(self) -> bool:
        """Would anything spoil training?"""
        return bool(self.of(SPOILS))

    def verdict(self) -> str:
        """One sentence for people."""
        bad, notes = self.of(SPOILS), self.of(NOTE)
        if bad:
            return f"{len(bad)} {_things(bad)} would spoil training: {'; '.join(f.what for f in bad)}."
        said = f"Nothing would spoil training; {len(notes)} {_things(notes)} worth knowing." if notes else ""
        if self.tokenized >= self.pairs:
            return said or "Nothing was found."
        if not self.tokenized:
            left = "Tokens and the chat template were not looked at: --model_name_or_path names the model."
            return f"{said or 'Nothing was found in the texts.'} {left}"
        seen = f"in a random sample of {self.tokenized:,} of {self.pairs:,} pairs"
        return f"{said or 'Nothing was found.'} Tokens and the chat template were looked at {seen}."

    def as_dict(self, located: Callable[[Iterable[int]], list[RowExample]]) -> dict[str, Any]:
        """Plain JSON values; `located` names rows."""
        whole = asdict(self)
        for finding, plain in zip(self.findings, whole["findings"], strict=True):
            plain["share"] = finding.share
            plain["rows"] = [row.place for row in located(finding.rows[:MAX_ROWS].tolist())]
            plain["rows_in_all"] = len(finding.rows)
            plain["examples"] = [{"row": example.place, "text": example.text} for example in finding.examples]
        return {"verdict": self.verdict(), "spoiled": self.spoiled, **whole}


#: Rows of one finding that the JSON lists.
MAX_ROWS = 1000


def _things(findings: list[Finding]) -> str:
    return "thing" if len(findings) == 1 else "things"
