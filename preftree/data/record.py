"""What the data layer speaks in: a prompt with its ranked answers, and the preference pair taken from it.

A record keeps everything that a source says about one prompt (all answers, with ranks or scores), a pair is
what DPO learns from: one prompt, the answer preferred and the answer not preferred. Texts are kept exactly as
they stand in the source; nothing is stripped, merged or sorted here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation: who speaks (`system`, `user`, `assistant`, …) and what is said.

    `keys` is a JSON object of the message's other keys (`tool_calls`, `reasoning_content`, `name`, …), "" for none;
    a `"content": null` in it says that the message had no content.
    """

    role: str
    content: str
    keys: str = ""

    @property
    def is_empty(self) -> bool:
        """Does it say nothing: no text, and no call or reasoning either?"""
        return not self.keys and not self.content.strip()


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt.

    `rank` is 1 for the best answer and grows from there; equal ranks mean that the source prefers neither.
    `score` is the source's own number, higher is better; it orders the answers only where ranks are absent.
    `keys` are those of the answer's message, as in `Turn`.
    """

    text: str
    score: float | None = None
    rank: int | None = None
    keys: str = ""

    @property
    def is_empty(self) -> bool:
        """Does it say nothing: no text, and no call or reasoning either?"""
        return not self.keys and not self.text.strip()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with the answer preferred and the one not preferred; the three always come from one record.

    `system` is None where the source gives no system text (an empty text stays an empty text).
    `turns` is the conversation up to the answer. `source` names the place for people ("pairs.jsonl:12"),
    `row` is the zero-based position among all rows read by one load, so it orders and identifies pairs.
    `chosen_keys` and `rejected_keys` are the other keys of the answers' messages, as in `Turn`. `tools` (a JSON
    list) and `template_kwargs` (a JSON object) are passed to the chat template, "" for none.

    A ranked list is the pair of its best and its worst answer, with `others` beside them. `ranks` are those of chosen,
    rejected and other answers: 1 for the best, the same number where the source prefers neither.
    """

    system: str | None
    turns: tuple[Turn, ...]
    chosen: str
    rejected: str
    source: str
    row: int
    chosen_keys: str = ""
    rejected_keys: str = ""
    tools: str = ""
    template_kwargs: str = ""
    others: tuple[Turn, ...] = ()
    ranks: tuple[int, ...] = (1, 2)

    @property
    def answers(self) -> tuple[Turn, ...]:
        """The chosen, the rejected and any other answers as messages."""
        return (
            Turn("assistant", self.chosen, self.chosen_keys),
            Turn("assistant", self.rejected, self.rejected_keys),
            *self.others,
        )

    @property
    def prompt_parts(self) -> list[str]:
        """Everything that makes the prompt what it is, to hash or compare."""
        parts = [part for turn in self.turns for part in (turn.role, turn.content, turn.keys)]
        system = "" if self.system is None else f"system: {self.system}"  # an empty one is not none
        return [system, *parts, self.tools, self.template_kwargs]


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt with all its answers, as one row of a source states it.

    `source` and `row` are as in `PreferencePair`; `extra` holds the columns that the format does not use. A record
    that was put together from two rows stands at the earlier one, and `other_row` is the later one. `tools` and
    `template_kwargs` are as in `PreferencePair`; `notes` say how the row was read where that was not plain.
    """

    system: str | None
    turns: tuple[Turn, ...]
    responses: tuple[Response, ...]
    source: str = ""
    extra: Mapping[str, Any] | None = field(default=None, compare=False)
    row: int = 0
    other_row: int | None = None
    tools: str = ""
    template_kwargs: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    def pairs(self, rule: str = "best_worst", min_margin: float = 0.0) -> list[PreferencePair]:
        """The pairs that `rule` (one of `PAIR_RULES`) makes of the answers; never of two that are equally good.

        Answers are ordered by rank if every one has a rank, else by score if every one has a score; no order,
        no pair. A `min_margin` above 0 keeps only pairs whose scores differ by more, so none without scores; in a
        list, answers that differ by no more have the same rank.
        """
        keys = self._keys()
        if keys is None:
            return []
        made = [(b, w, *o) for b, w, *o in PAIR_RULES[rule](keys) if min_margin <= 0 or self._margin(b, w) > min_margin]
        return [self._pair(places, keys, min_margin) for places in made]

    def _pair(self, places: Sequence[int], keys: Sequence[float], min_margin: float) -> PreferencePair:
        """The pair of the first two places; with more of them a ranked list."""
        chosen, rejected, *others = (self.responses[place] for place in places)
        pair = PreferencePair(
            self.system,
            self.turns,
            chosen.text,
            rejected.text,
            self.source,
            self.row,
            chosen_keys=chosen.keys,
            rejected_keys=rejected.keys,
            tools=self.tools,
            template_kwargs=self.template_kwargs,
        )
        if not others:
            return pair
        turns = tuple(Turn("assistant", response.text, response.keys) for response in others)
        return replace(pair, others=turns, ranks=_ranks([keys[place] for place in places], min_margin))

    @property
    def scored(self) -> bool:
        """Has every answer a score, as `min_margin` needs?"""
        return all(response.score is not None for response in self.responses)

    def _margin(self, best: int, worse: int) -> float:
        """By how much the scores of two answers differ; 0 where one has none."""
        high, low = self.responses[best].score, self.responses[worse].score
        return high - low if high is not None and low is not None else 0.0

    def _keys(self) -> list[float] | None:
        """A number for each answer, smaller is better; None where they cannot be compared."""
        ranks = [response.rank for response in self.responses if response.rank is not None]
        scores = [response.score for response in self.responses if response.score is not None]
        if self.responses and len(ranks) == len(self.responses):
            return [float(rank) for rank in ranks]
        if self.responses and len(scores) == len(self.responses):
            return [-score for score in scores]
        return None


def _best_worst(keys: Sequence[float]) -> list[tuple[int, int]]:
    best, worst = min(keys), max(keys)
    return [(keys.index(best), keys.index(worst))] if best < worst else []


def _best_each(keys: Sequence[float]) -> list[tuple[int, int]]:
    best = keys.index(min(keys))
    return [(best, other) for other, key in enumerate(keys) if keys[best] < key]


def _all(keys: Sequence[float]) -> list[tuple[int, int]]:
    return [(a, b) for a, better in enumerate(keys) for b, key in enumerate(keys) if better < key]


def _list(keys: Sequence[float]) -> list[tuple[int, ...]]:
    return [(b, w, *(i for i in range(len(keys)) if i not in (b, w))) for b, w in _best_worst(keys)]


def _ranks(keys: Sequence[float], margin: float) -> tuple[int, ...]:
    """1 for the smallest key and on from there; keys at most `margin` above the first one of a rank share that rank."""
    ranks: dict[float, int] = {}
    first, rank = -math.inf, 0
    for key in sorted(keys):
        if key > first + max(margin, 0.0):
            first, rank = key, rank + 1
        ranks[key] = rank
    return tuple(ranks[key] for key in keys)


PAIR_RULES: dict[str, Callable[[Sequence[float]], Sequence[tuple[int, ...]]]] = {
    "best_worst": _best_worst,
    "best_each": _best_each,
    "all": _all,
    "list": _list,
}
"""How a record's answers become pairs: a key for each answer, smaller is better -> (preferred, not preferred), and in
a list all other answers after them.

Of equally good answers `best_worst`, `best_each` and `list` take the first.
"""


class LoadedPairs(list[PreferencePair]):
    """The pairs of one load, in the order of their rows, and what is worth telling about it.

    `format`: the recognised format (several, joined with commas, if files differ). `files`: what was read.
    `rows`: how many rows were read. `skipped`: reason -> rows that gave no pair. `notes`: how rows were read where
    that was not plain -> how many. `left_out`: files of a folder that belong to another split.
    """

    def __init__(self, pairs: Iterable[PreferencePair] = ()) -> None:
        super().__init__(pairs)
        self.format = ""
        self.files: list[str] = []
        self.rows = 0
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.left_out: list[str] = []

    def summary(self) -> list[str]:
        """Plain sentences for people: what was read, as what, and why rows were left out."""
        said = [f"Read {len(self)} pairs from {self.rows} rows of {', '.join(self.files)} ({self.format})."]
        said += [f"Skipped {count} rows: {reason}." for reason, count in self.skipped.items()]
        said += [f"In {count} rows {note}." for note, count in self.notes.items()]
        if self.left_out:
            said.append(f"Left out, as files of another split: {', '.join(self.left_out)}.")
        return said
