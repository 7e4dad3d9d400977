"""Does a text contain questions of the benchmarks that the model will be evaluated on?

The measure is the one of Tulu 3 (arXiv 2411.15124, section 3.2): the n-grams of words that a text and a test
question share are marked in the question; if they cover at least half of its words, the text counts as containing
the question. A question of fewer than n words must occur in full; one of fewer than `MIN_WORDS` words is skipped,
since it would be found anywhere. Case, punctuation and white space are ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftree.benchmarks import BENCHMARKS, headings
from preftree.data.files import READERS
from preftree.errors import DataError
from preftree.text.duplicates import words

#: Words in an n-gram; 8 as in Tulu 3 and PaLM.
NGRAM = 8
#: Share of a question's words that must be covered.
COVERED = 0.5
#: Fewest words of a question that is looked for.
MIN_WORDS = 5

_NOT_TESTED = re.compile(r"(?:^|[^a-z])(?:aux\w*|train\w*|dev\w*)(?:[^a-z]|$)")


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """One question of a benchmark: the benchmark's name, where it is ("arc_test.jsonl:12"), its text."""

    benchmark: str
    place: str
    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A test question that a text holds, and the share of its words that were found."""

    question: BenchmarkQuestion
    covered: float


class OverlapIndex:
    """Finds test questions in texts. `too_short` counts those left out; about 280 bytes per n-gram are kept."""

    def __init__(self, questions: Iterable[BenchmarkQuestion], *, ngram: int = NGRAM, covered: float = COVERED) -> None:
        if ngram < 2 or not 0 < covered <= 1:
            raise ValueError(f"ngram must be at least 2 and covered in (0, 1], got {ngram} and {covered}")
        self.ngram, self.covered = ngram, covered
        self.questions: list[BenchmarkQuestion] = []
        self.too_short = 0
        self._lengths: list[int] = []
        # Words in an n-gram -> hash of them -> where it occurs, as (question, first word).
        self._ngrams: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for question in questions:
            self._add(question)

    def __len__(self) -> int:
        return len(self.questions)

    def counts(self) -> Counter[str]:
        """How many questions are looked for, by benchmark."""
        return Counter(question.benchmark for question in self.questions)

    def find(self, text: str) -> list[Hit]:
        """The test questions in `text`, most covered first."""
        found = words(text)
        covered: dict[int, set[int]] = {}
        for size, known in self._ngrams.items():
            for i in range(len(found) - size + 1):
                for question, first in known.get(hash(tuple(found[i : i + size])), ()):
                    covered.setdefault(question, set()).update(range(first, first + size))
        hits = [Hit(self.questions[q], len(places) / self._lengths[q]) for q, places in covered.items()]
        return sorted((hit for hit in hits if hit.covered >= self.covered), key=lambda hit: -hit.covered)

    def _add(self, question: BenchmarkQuestion) -> None:
        found = words(question.text)
        if len(found) < MIN_WORDS:
            self.too_short += 1
            return
        number, size = len(self.questions), min(self.ngram, len(found))
        self.questions.append(question)
        self._lengths.append(len(found))
        known = self._ngrams.setdefault(size, {})
        for i in range(len(found) - size + 1):
            known.setdefault(hash(tuple(found[i : i + size])), []).append((number, i))


# --- the questions of the benchmarks --------------------------------------------------------------


def question_of(row: Mapping[str, Any], place: str = "") -> BenchmarkQuestion | None:
    """The question of a row of one of the four test sets, None for another row."""
    for benchmark in BENCHMARKS:
        if (text := benchmark.question(row)) is not None:
            return BenchmarkQuestion(benchmark.heading, place, text)
    return None


def read_test_questions(folder: str | Path, tell: Callable[[str], None] | None = None) -> Iterator[BenchmarkQuestion]:
    """The questions of all files (jsonl, json, csv, parquet) below `folder` that hold questions of the test sets.

    Files whose name tells a training or few-shot split (train, dev) are left out: nobody is judged by them.
    `tell` is called with sentences about the files that are left out.

    Raises DataError where `folder` is none, or holds no test question.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Give the folder with the test sets' files (jsonl, parquet, …).")
    some, not_tested = False, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in READERS or not path.is_file():
            continue
        if _NOT_TESTED.search(name.lower()):
            not_tested.append(name)
            continue
        count = 0
        for number, row in READERS[path.suffix.lower()](path):
            question = question_of(row, f"{name}:{number}") if isinstance(row, Mapping) else None
            if question is not None:
                count += 1
                yield question
        some = some or count > 0
        if not count and tell:
            tell(f"left out, as it holds no question of {headings('or')}: {name}")
    if not_tested and tell:
        tell(f"left out, as no model is judged by training or few-shot splits: {', '.join(not_tested)}")
    if not some:
        raise DataError(
            f"{folder} holds no test question: no file there has the columns of {headings('or')}. "
            f"Give a folder with those test sets as the hub has them."
        )
