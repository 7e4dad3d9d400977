"""Measures that need the texts, so they see every record while it is read: test sets, near duplicates, languages."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from preftree.check.report import Finding, FixAction, Measure, make_finding
from preftree.data.record import PreferencePair, PreferenceRecord
from preftree.text.duplicates import NearDuplicates, exact_key
from preftree.text.language import language
from preftree.text.overlap import OverlapIndex

#: Pairs whose languages are guessed.
LANGUAGE_SAMPLE = 500


def _prompt(record: PreferenceRecord | PreferencePair) -> str:
    return "\n".join(turn.content for turn in record.turns)


class Overlap:
    """Rows that hold questions of the test sets, in the prompt or in an answer."""

    def __init__(self, index: OverlapIndex) -> None:
        self.index = index
        self.rows = array("q")
        self.questions: dict[str, set[str]] = {}

    def __call__(self, row: int, record: PreferenceRecord, pairs: list[PreferencePair]) -> None:
        texts = [_prompt(record), *(response.text for response in record.responses)]
        hits = [hit.question for text in texts for hit in self.index.find(text)]
        for question in hits:
            self.questions.setdefault(question.benchmark, set()).add(question.place)
        if hits:
            self.rows.append(row)

    def finding(self, total: int) -> Finding:
        """The rows, and how many questions of which test set they hold."""
        measure = Measure(
            "rows with questions of the test sets",
            "where they are the same questions, scores on them will say nothing; compare them",
            spoils=1e-12,
            fix=FixAction.DROP,
        )
        rows = np.array(self.rows, np.int64)
        held = ", ".join(
            f"{len(self.questions.get(name, ()))} of {count} {name}" for name, count in self.index.counts().items()
        )
        more = f"; {self.index.too_short} questions are too short to look for" if self.index.too_short else ""
        first = sorted(place for places in self.questions.values() for place in places)[:3]
        named = f" ({', '.join(first)}{', …' if sum(map(len, self.questions.values())) > 3 else ''})" if first else ""
        return make_finding(
            "test_overlap", measure, len(rows), total, rows, detail=f"questions found: {held}{named}{more}"
        )


class NearPrompts:
    """Rows whose prompt is nearly one that an earlier row had, but not the same."""

    def __init__(self) -> None:
        self.index = NearDuplicates[int]()
        self.rows = array("q")
        self._seen: set[int] = set()

    def __call__(self, row: int, record: PreferenceRecord, pairs: list[PreferencePair]) -> None:
        text = _prompt(record)
        key = exact_key(text)
        if key not in self._seen:
            self._seen.add(key)
            if self.index.add(row, text):
                self.rows.append(row)

    def finding(self, total: int) -> Finding:
        """The later rows of each group."""
        measure = Measure(
            "prompts nearly equal to an earlier one",
            "less is learned from them, and validation may hold a training prompt in other words",
            spoils=0.5,
        )
        rows = np.array(self.rows, np.int64)
        return make_finding("near_duplicate_prompts", measure, len(rows), total, rows)


def languages(sample: Sequence[tuple[int, PreferencePair]], pairs: int) -> tuple[list[Finding], dict[str, Any]]:
    """Answers in another language than their prompt, and the prompts' languages, from a sample of `pairs`."""
    some = sample[:LANGUAGE_SAMPLE]
    counts: Counter[str] = Counter()
    rows: list[int] = []
    told = 0
    for row, pair in some:
        prompt, chosen = language(pair.turns[-1].content), language(pair.chosen)
        counts[prompt or "too short to tell"] += 1
        if prompt and chosen:
            told += 1
            if prompt != chosen:
                rows.append(row)
    measure = Measure(
        "chosen answers in another language than the prompt",
        "right for translations; otherwise the model learns to change the language",
        spoils=0.3,
        note=0.02,
    )
    finding = make_finding(
        "language",
        measure,
        len(rows),
        told,
        np.array(rows, np.int64),
        unit="pairs",
        sampled=len(some) if len(some) < pairs else None,
    )
    shown = ", ".join(f"{code} {count / len(some):.1%}" for code, count in counts.most_common(6))
    return [finding], {"languages of the prompts": shown} if some else {}
