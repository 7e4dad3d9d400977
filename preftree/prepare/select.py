"""Which rows are taken: stratified, reproducible by the seed, in two or more passes over a source of any size.

The first pass (`scan.py`) keeps numbers only. Then each stratum's rows are taken in the order of their priority, and
only those are read again and looked at closely: lengths in tokens, overlap with the test sets, near duplicates of
a question already taken. Where too many fail, the next ones follow, in a further pass. So the expensive checks cost
what is taken and not what is there; their counts are of the rows examined.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from preftree.benchmarks import BENCHMARKS
from preftree.config.prepare import PrepareSettings, SelectSettings
from preftree.data.chat import Chat
from preftree.errors import DataError
from preftree.io.atomic import atomic_file
from preftree.io.jsonl import read_jsonl
from preftree.prepare.engines.local import make_chat, question_messages
from preftree.prepare.folder import damaged
from preftree.prepare.scan import REPORT_EVERY, ReadProgress, Scan, Scanner, merge, no_progress, strata
from preftree.prepare.source import Place, SourceRow, read_rows
from preftree.prepare.workers import Workers
from preftree.text.duplicates import NearDuplicates, exact_key
from preftree.text.overlap import BenchmarkQuestion, OverlapIndex

PROMPT_SHORT, PROMPT_LONG = "the prompt is too short", "the prompt is too long"
ANSWER_SHORT, ANSWER_LONG = "the answer is too short", "the answer is too long"
NEAR_DUPLICATE = "the question is nearly that of a row already taken"
_CHUNK = 64
_MARGIN = 1.3  # how many candidates are read for each row wanted, at first

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selected:
    """A row that was taken. `key` names it for good: seeds are made with it."""

    key: str
    id: str
    system: str
    question: str
    chosen: str
    family: str
    teacher: str
    place: str
    prompt_tokens: int
    chosen_tokens: int


@dataclass
class Selection:
    """What was selected, in random order (so that the first n are a sample, too), and how it came about.

    `removed` counts, by reason, rows that the first pass left out; `rejected` those that were examined closely and
    failed. `examined` counts the latter and the selected ones.
    """

    rows: list[Selected]
    source_digest: str
    source_rows: int
    strata: int
    removed: Counter[str] = field(default_factory=Counter)
    examined: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def write(self, path: Path) -> None:
        """As JSON lines, the counts first; there whole or not at all."""
        head = {**vars(self), "rows": len(self.rows)}
        with atomic_file(path) as file:
            for line in (head, *(asdict(row) for row in self.rows)):
                file.write(json.dumps(line).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Selection:
        """What `write` wrote. Raises RunError where it is not that any more."""
        try:
            head, *rows = read_jsonl(path)
            if head["rows"] != len(rows):
                raise ValueError(f"{len(rows)} rows of {head['rows']}")
            head |= {name: Counter(head[name]) for name in ("removed", "rejected")}
            return cls(**{**head, "rows": [Selected(**row) for row in rows]})
        except (DataError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from None


@dataclass
class Passes:
    """Reads the places through workers and reports its progress."""

    places: Sequence[Place]
    workers: Workers
    tell: ReadProgress = no_progress

    def scan(self, select: SelectSettings) -> Scan:
        """The first pass over everything."""
        scans = dict(self.workers.map(partial(Scanner, select, self.tell), self.places))
        whole = merge([scans[number] for number in sorted(scans)])
        self.tell(whole.rows, whole.rows)
        return whole

    def fetch(self, scan: Scan, wanted: Ints) -> dict[int, SourceRow]:
        """The rows of a scan with the given indices, read again."""
        jobs = []
        for place in np.unique(scan.place[wanted]):
            indices = wanted[scan.place[wanted] == place]
            jobs.append(
                (self.places[int(place)], dict(zip(scan.number[indices].tolist(), indices.tolist(), strict=True)))
            )
        work = self.workers.map(partial(Fetcher, self.tell), jobs)
        rows = {index: row for _, found in work for index, row in found}
        self.tell(len(scan), len(scan))
        return rows


@dataclass(frozen=True)
class Fetcher:
    """Reads a place again for the rows with the given positions -> indices, and no further than the last of them."""

    tell: ReadProgress = no_progress

    def __call__(self, job: tuple[Place, dict[int, int]]) -> list[tuple[int, SourceRow]]:
        place, wanted = job
        last = max(wanted)
        found = []
        for number, row in enumerate(read_rows(place)):
            if number % REPORT_EVERY == REPORT_EVERY - 1:
                self.tell(REPORT_EVERY, None)
            if number in wanted and isinstance(row, SourceRow):
                found.append((wanted[number], row))
            if number == last:
                break
        return found


@dataclass
class Examiner:
    """The close look at one chunk of rows: for each, a reason against it or "", and its lengths in tokens."""

    select: SelectSettings
    chat: Chat
    tests: OverlapIndex

    def __call__(self, rows: Sequence[SourceRow]) -> list[tuple[str, int, int]]:
        prompts = [self.chat.prompt(question_messages(self.chat, row.system, row.question)) for row in rows]
        ids = self.chat.tokenize({*prompts, *(row.response for row in rows)})
        lengths = [
            (len(self.chat.with_bos(ids[prompt])), len(ids[row.response]))
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        return [(self._against(row, *length), *length) for row, length in zip(rows, lengths, strict=True)]

    def _against(self, row: SourceRow, prompt: int, answer: int) -> str:
        for length, low, high, short, long in (
            (prompt, self.select.min_prompt_length, self.select.max_prompt_length, PROMPT_SHORT, PROMPT_LONG),
            (answer, self.select.min_answer_length, self.select.max_answer_length, ANSWER_SHORT, ANSWER_LONG),
        ):
            if not low <= length <= high:
                return short if length < low else long
        hits = self.tests.find(f"{row.question}\n{row.response}") if len(self.tests) else []
        return f"it holds a test question of {hits[0].question.benchmark}" if hits else ""


MakeExaminer = Callable[[], Examiner]


def make_examiner(settings: PrepareSettings, tests: Sequence[BenchmarkQuestion]) -> Examiner:
    """An examiner with the tokenizer and the test questions."""

    return Examiner(settings.select, make_chat(settings), OverlapIndex(tests))


def select(
    passes: Passes,
    settings: SelectSettings,
    examiner: MakeExaminer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
    """`settings.num_samples` rows, or all that pass where there are fewer."""
    scan = passes.scan(settings)
    stratum = strata(scan, settings.stratify_by)
    draft = _Draft(scan, stratum, settings)
    result = Selection([], scan.digest, scan.rows, len(draft.sizes), scan.removed)
    taken: list[tuple[int, Selected]] = []
    near = NearDuplicates[int](settings.near_duplicates) if settings.near_duplicates else None
    while len(candidates := draft.next()):
        rows = passes.fetch(scan, candidates)
        verdicts = _examine(candidates.tolist(), rows, passes.workers, examiner)
        for index in candidates.tolist():
            row, (reason, prompt, answer) = rows[index], verdicts[index]
            if not draft.wants(index):
                continue
            if not reason and near is not None and near.find(row.question):
                reason = NEAR_DUPLICATE
            draft.seen(index, taken=not reason)
            result.examined += 1
            if reason:
                result.rejected[reason] += 1
                continue
            if near is not None:
                near.add(index, row.question)
            taken.append((int(scan.priority[index]), _selected(row, prompt, answer)))
            progress(len(taken), settings.num_samples)
    progress(len(taken), len(taken))
    result.rows = [row for _, row in sorted(taken, key=lambda pair: (pair[0], pair[1].key))]
    return result


def _examine(
    order: Sequence[int], rows: dict[int, SourceRow], workers: Workers, examiner: MakeExaminer
) -> dict[int, tuple[str, int, int]]:
    chunks = [order[start : start + _CHUNK] for start in range(0, len(order), _CHUNK)]
    verdicts: dict[int, tuple[str, int, int]] = {}
    for number, found in workers.map(examiner, ([rows[index] for index in chunk] for chunk in chunks)):
        verdicts.update(zip(chunks[number], found, strict=True))
    return verdicts


def _selected(row: SourceRow, prompt: int, answer: int) -> Selected:
    key = f"{row.id}/{exact_key(row.question):016x}"  # ids alone need not be unique
    return Selected(
        key, row.id, row.system, row.question, row.response, row.family, row.teacher, row.place, prompt, answer
    )


class _Draft:
    """Hands out candidates, each stratum's in the order of their priority, until the quotas are full."""

    def __init__(self, scan: Scan, stratum: Ints, settings: SelectSettings) -> None:
        self.stratum, self.priority, self.allocation = stratum, scan.priority, settings.allocation
        self.sizes = np.bincount(stratum) if len(stratum) else np.zeros(0, np.int64)
        self.order = np.lexsort((np.arange(len(scan)), scan.priority, stratum))
        self.start = (
            np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64) if len(self.sizes) else self.sizes
        )
        self.used = np.zeros_like(self.sizes)  # of each stratum: candidates that have been examined
        self.want = allocate(self.sizes, settings.num_samples, self.allocation)
        self.missing = int(self.want.sum())
        self.margin = _MARGIN

    def next(self) -> Ints:
        """Indices of the candidates to examine now, by priority; none when all is had or nothing is left."""
        room = self.sizes - self.used
        self.want = np.minimum(self.want, room)
        # What exhausted strata still owe, the others give.
        self.want += allocate(room - self.want, self.missing - int(self.want.sum()), self.allocation)
        ask = np.minimum(room, np.where(self.want, np.ceil(self.want * self.margin) + 2, 0).astype(np.int64))
        self.margin *= 2
        begin = self.start + self.used
        parts = [self.order[b : b + n] for b, n in zip(begin.tolist(), ask.tolist(), strict=True)]
        chosen = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return chosen[np.lexsort((chosen, self.priority[chosen]))]

    def wants(self, index: int) -> bool:
        """Whether the row's stratum still has a place."""
        return bool(self.want[self.stratum[index]] > 0)

    def seen(self, index: int, *, taken: bool) -> None:
        """The row, its stratum's next one, was examined."""
        self.used[self.stratum[index]] += 1
        if taken:
            self.want[self.stratum[index]] -= 1
            self.missing -= 1


def allocate(sizes: Ints, total: int, how: str) -> Ints:
    """How many each stratum gives of `total`, never more than its size; fewer in all only where all are empty.

    proportional: to the sizes, rounded by the largest remainder. equal: the same number each, and what small
    strata lack is spread over the others.
    """
    given = np.zeros_like(sizes)
    total = min(total, int(sizes.sum()))
    if total <= 0:
        return given
    if how == "equal":
        for rank, stratum in enumerate(np.argsort(sizes, kind="stable")):
            given[stratum] = min(int(sizes[stratum]), -(-(total - int(given.sum())) // (len(sizes) - rank)))
        return given
    share = sizes * (total / sizes.sum())
    given = np.minimum(np.floor(share).astype(np.int64), sizes)
    rest = np.argsort(-(share - given), kind="stable")
    for stratum in rest[: total - int(given.sum())]:
        given[stratum] += 1
    return given


def benchmark_questions(where: str | None, tell: Callable[[str], None]) -> Iterator[BenchmarkQuestion]:
    """The questions to keep out: of a local folder, of the hub's four sets, or none."""
    from preftree.data.sources import Source, find_tables
    from preftree.text.overlap import question_of, read_test_questions

    if where is None:
        return
    if where != "hub":
        yield from read_test_questions(where, tell)
        return
    for benchmark in BENCHMARKS:
        name, first = benchmark.hub
        for config in (first, *benchmark.more_configs):
            ((_, short, rows),) = find_tables(Source(name, benchmark.tested, config, streaming=True))[0]
            for number, row in rows:
                question = question_of(row, f"{short}:{number}") if isinstance(row, dict) else None
                if question is not None:
                    yield question
