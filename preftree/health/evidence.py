"""What findings are functions of: the log records of a run so far, and facts about its pairs and answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class AnswerLengths:
    """Tokens of the answers of a set of pairs, and how many answers were cut at the maximum length.

    Args:
        pairs: in the set; the lists may hold the first ones only.
        prompt: tokens of the prompts.
    """

    pairs: int
    chosen: Sequence[int]
    rejected: Sequence[int]
    prompt: Sequence[int] = ()
    chosen_cut: int = 0
    rejected_cut: int = 0

    # Asked at every log line of a run, whose pairs do not change.

    @cached_property
    def mean_chosen(self) -> float:
        return fmean(self.chosen) if self.chosen else math.nan

    @cached_property
    def mean_rejected(self) -> float:
        return fmean(self.rejected) if self.rejected else math.nan

    @cached_property
    def unequal(self) -> tuple[int, int]:
        """Pairs whose answers differ in length, and those of them whose chosen answer is the longer one."""
        both = [(c, r) for c, r in zip(self.chosen, self.rejected, strict=True) if c != r]
        return len(both), sum(c > r for c, r in both)


@dataclass(frozen=True)
class PairMargins:
    """Margins of single pairs in implicit reward, and chosen minus rejected length in tokens, pair by pair."""

    margin: Sequence[float]
    length_difference: Sequence[int]

    @property
    def accuracy(self) -> float:
        return _share(value > 0 for value in self.margin)

    @property
    def length_controlled_accuracy(self) -> float | None:
        """Mean of the accuracies where the chosen answer is longer and where it is shorter; None without one of them.

        A model that prefers the longer (or the shorter) answer and nothing else has 0.5.
        """
        both = zip(self.margin, self.length_difference, strict=True)
        longer: list[bool] = []
        shorter: list[bool] = []
        for margin, difference in both:
            if difference:
                (longer if difference > 0 else shorter).append(margin > 0)
        return (_share(longer) + _share(shorter)) / 2 if longer and shorter else None


@dataclass(frozen=True)
class SampledAnswers:
    """Answers to fixed prompts: their tokens before and after, and log π/r of answers drawn from the model, in nats."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    log_ratios: Sequence[float] = ()


@dataclass(frozen=True)
class Evidence:
    """A run so far.

    Args:
        records: log records of training, in the order of steps, by the names of the run folder's metrics.
        evaluations: log records of the held-out pairs.
        beta: of the objective.
        reference: is there a reference, so that rewards are β log π/r?
        pairs_per_step: on all ranks.
        progress: share of the planned steps that is done.
        lengths: of the training pairs.
        evaluated_pairs: pairs in each evaluation.
        answers: to fixed prompts.
    """

    records: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]] = ()
    beta: float = 0.1
    reference: bool = True
    pairs_per_step: int = 1
    progress: float = 1.0
    lengths: AnswerLengths | None = None
    evaluated_pairs: int = 0
    answers: SampledAnswers = field(default_factory=SampledAnswers)

    def values(self, name: str) -> list[float]:
        """One metric over the training records; records without it are left out."""
        return [float(record[name]) for record in self.records if name in record]

    def late(self, name: str) -> float:
        """Mean of a training metric over the last quarter of its records, at least one; NaN without any."""
        found = self.values(name)
        return fmean(found[-max(1, len(found) // 4) :]) if found else math.nan

    def last_evaluation(self, name: str) -> float:
        """A metric of the newest evaluation; NaN without one."""
        found = [float(record[name]) for record in self.evaluations if name in record]
        return found[-1] if found else math.nan

    def now(self, name: str) -> float:
        """A pair metric on held-out pairs where there are any, else on the last training pairs."""
        held_out = self.last_evaluation(f"eval_{name}")
        return self.late(name) if math.isnan(held_out) else held_out

    @property
    def step(self) -> int:
        return int(self.records[-1].get("step", 0)) if self.records else 0

    def first_pass(self) -> tuple[float, int]:
        """Accuracy on pairs not yet trained on, in the second half of the first epoch's records; and on how many.

        A step's metrics are measured before its update, so in the first epoch they are those of unseen pairs.
        """
        steps = [0, *(int(record.get("step", 0)) for record in self.records)]
        weights = [(after - before) * self.pairs_per_step for before, after in itertools.pairwise(steps)]
        unseen = [
            (float(record["rewards/accuracies"]), weight)
            for record, weight in zip(self.records, weights, strict=True)
            if "rewards/accuracies" in record and float(record.get("epoch") or 0.0) <= 1.0 and weight > 0
        ]
        half = unseen[len(unseen) // 2 :]
        count = sum(weight for _, weight in half)
        return (sum(value * weight for value, weight in half) / count if count else math.nan), count


def _share(values: Any) -> float:
    found = [bool(value) for value in values]
    return sum(found) / len(found) if found else math.nan
