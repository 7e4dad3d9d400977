"""Each finding on the smallest evidence that has it, on what is just short of it, and on a healthy run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from preftree.health.evidence import AnswerLengths, Evidence, PairMargins, SampledAnswers
from preftree.health.findings import (
    ERRORS_ABOVE_CHANCE,
    FINDINGS,
    Diagnosis,
    Level,
    diagnose,
    verdict,
)

LENGTHS = AnswerLengths(pairs=100, chosen=[40] * 50 + [50] * 50, rejected=[50] * 50 + [40] * 50)


def records(windows: int = 20, **last: float) -> list[dict[str, Any]]:
    """Log lines of a healthy run of one epoch, every metric going from its start to where `last` says."""
    start = {"loss": 0.693, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0,
             "rewards/accuracies": 0.5}  # fmt: skip
    end = {"loss": 0.45, "rewards/chosen": 0.2, "rewards/rejected": -0.6, "rewards/margins": 0.8,
           "rewards/accuracies": 0.8} | {name.replace("__", "/"): value for name, value in last.items()}  # fmt: skip
    found = []
    for index in range(windows):
        done = min(1.0, 2 * (index + 1) / windows)
        found.append({name: start[name] + done * (end[name] - start[name]) for name in start})
        found[-1] |= {"step": 10 * (index + 1), "epoch": (index + 1) / windows}
    return found


HEALTHY = Evidence(records(), beta=0.1, pairs_per_step=4, lengths=LENGTHS)


def evaluations(losses: list[float], accuracy: float = 0.8) -> list[dict[str, Any]]:
    return [
        {"step": 40 * (index + 1), "eval_loss": loss, "eval_rewards/accuracies": accuracy, "eval_rewards/chosen": 0.1,
         "eval_rewards/margins": 0.5} for index, loss in enumerate(losses)
    ]  # fmt: skip


def keys(evidence: Evidence) -> list[str]:
    return [found.key for found in diagnose(evidence)]


def test_a_healthy_run_has_no_finding() -> None:
    assert diagnose(HEALTHY) == []
    assert "healthy" in verdict([])


@pytest.mark.parametrize(
    ("name", "evidence"),
    [
        ("margin_exploding", replace(HEALTHY, records=records(loss=1.2))),
        ("margin_exploding", replace(HEALTHY, records=records(loss=math.nan))),
        ("margin_exploding", replace(HEALTHY, records=records(rewards__margins=20.0))),
        ("margin_exploding", replace(HEALTHY, records=records(rewards__chosen=-5.0))),  # 50 nats on 45 tokens
        ("accuracy_stuck", replace(HEALTHY, records=records(rewards__accuracies=0.52))),
        ("accuracy_stuck", replace(HEALTHY, evaluations=evaluations([0.7], 0.51), evaluated_pairs=200)),
        ("not_learning", replace(HEALTHY, records=records(rewards__chosen=0.01, rewards__rejected=-0.01))),
        ("length_bias", replace(HEALTHY, lengths=AnswerLengths(100, [90] * 100, [30] * 100))),
        ("length_bias", replace(HEALTHY, lengths=AnswerLengths(100, [30] * 100, [90] * 100))),
        ("displacement", replace(HEALTHY, records=records(rewards__chosen=-0.6))),  # 6 nats on 45 tokens
        ("overfitting", replace(HEALTHY, evaluations=evaluations([0.6, 0.5, 0.7]), evaluated_pairs=100)),
        ("saturated", replace(HEALTHY, records=records(loss=0.001, rewards__accuracies=1.0))),
        ("far_from_reference", replace(HEALTHY, answers=SampledAnswers(log_ratios=[40.0] * 8))),
        ("answers_longer", replace(HEALTHY, answers=SampledAnswers([20] * 8, [60] * 8))),
        ("answers_shorter", replace(HEALTHY, answers=SampledAnswers([60] * 8, [20] * 8))),
        ("chosen_cut", replace(HEALTHY, lengths=replace(LENGTHS, chosen_cut=10))),
    ],
)
def test_each_finding_is_found_by_itself(name: str, evidence: Evidence) -> None:
    assert keys(evidence) == [name]


@pytest.mark.parametrize(
    "evidence",
    [
        replace(HEALTHY, records=records(loss=0.9)),  # noise above the start, less than half again
        replace(HEALTHY, records=records(rewards__accuracies=0.62)),
        replace(HEALTHY, records=records(rewards__accuracies=0.52), progress=0.3),  # too early to say
        replace(HEALTHY, records=records(4, rewards__accuracies=0.52), pairs_per_step=1),  # 20 pairs
        replace(HEALTHY, records=[]),
        replace(HEALTHY, records=records(6, rewards__chosen=0.01, rewards__rejected=-0.01)),  # too few log lines
        replace(HEALTHY, records=records(rewards__chosen=-0.2)),  # 2 nats of a whole answer
        replace(HEALTHY, records=records(rewards__chosen=-0.4)),  # 4 nats, but on 45 tokens
        replace(HEALTHY, records=records(rewards__chosen=-3.0), reference=False),  # β log π, which is below 0
        replace(HEALTHY, lengths=AnswerLengths(100, [90] * 60 + [30] * 40, [30] * 60 + [90] * 40)),
        replace(HEALTHY, lengths=AnswerLengths(20, [90] * 20, [30] * 20)),  # too few pairs
        replace(HEALTHY, evaluations=evaluations([0.6, 0.5, 0.51]), evaluated_pairs=100),
        replace(HEALTHY, answers=SampledAnswers([20] * 8, [25] * 8, [5.0] * 8)),
        replace(HEALTHY, answers=SampledAnswers([20] * 2, [90] * 2, [90.0] * 2)),  # too few prompts
    ],
)  # fmt: skip
def test_what_is_just_short_of_a_finding_is_none(evidence: Evidence) -> None:
    assert keys(evidence) == []


def test_a_few_cut_answers_are_a_note() -> None:
    (found,) = diagnose(replace(HEALTHY, lengths=replace(LENGTHS, chosen_cut=1)))
    assert (found.key, found.level) == ("chosen_cut", Level.NOTE)
    assert "healthy" in verdict([found])


def test_learning_by_heart_is_seen_by_accuracies_after_the_first_epoch() -> None:
    twice = [record | {"epoch": 2 * record["epoch"], "rewards/accuracies": 1.0} for record in records()]
    evidence = replace(HEALTHY, records=twice, evaluations=evaluations([0.6], 0.7), evaluated_pairs=100)
    assert keys(evidence) == ["overfitting"]
    assert keys(replace(evidence, evaluations=evaluations([0.6], 0.95))) == []


def test_accuracy_of_unseen_pairs_is_of_the_first_epoch_only() -> None:
    """Later epochs show pairs again: learned by heart, random labels have accuracy 1."""
    stuck = records(rewards__accuracies=0.5)
    again = [record | {"step": 200 + record["step"], "epoch": 1 + record["epoch"], "rewards/accuracies": 1.0,
                       "rewards/margins": 1.0} for record in records()]  # fmt: skip
    evidence = replace(HEALTHY, records=[*stuck, *again])
    accuracy, pairs = evidence.first_pass()
    assert (accuracy, pairs) == (pytest.approx(0.5), 400)
    assert "accuracy_stuck" in keys(evidence)


def test_chance_is_told_by_the_number_of_pairs() -> None:
    accuracy = 0.5 + ERRORS_ABOVE_CHANCE * 0.5 / math.sqrt(100)
    for pairs, found in ((100, ["accuracy_stuck"]), (110, [])):
        evidence = replace(HEALTHY, evaluations=evaluations([0.6], accuracy), evaluated_pairs=pairs)
        assert keys(evidence) == found


def test_warnings_come_first_and_are_counted() -> None:
    evidence = replace(HEALTHY, records=records(loss=1.2), answers=SampledAnswers([20] * 8, [60] * 8),
                       lengths=replace(LENGTHS, chosen_cut=10))  # fmt: skip
    found = diagnose(evidence)
    assert [each.level for each in found] == [Level.WARNING, Level.WARNING, Level.NOTE]
    assert verdict(found).startswith("2 warnings: The margin explodes")


def test_every_finding_explains_itself() -> None:
    assert list(FINDINGS) == [each.__name__ for each in FINDINGS.values()]
    found = diagnose(replace(HEALTHY, records=records(loss=1.2)))[0]
    assert isinstance(found, Diagnosis)
    assert all((found.title, found.number, found.meaning, found.remedy))


def test_length_controlled_accuracy_of_a_model_that_likes_long_answers_is_a_half() -> None:
    longer = [5, 3, 8, 2, 7, -4]
    likes_long = PairMargins([float(value) for value in longer], longer)
    assert likes_long.accuracy == pytest.approx(5 / 6)
    assert likes_long.length_controlled_accuracy == pytest.approx(0.5)
    assert PairMargins([1.0], [3]).length_controlled_accuracy is None
