"""The shipped demo set."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest
from rich.console import Console

from preftree.check.report import NOTE, SPOILS
from preftree.check.run import check
from preftree.config.check import parse_check_settings
from preftree.demo.checks import passes
from preftree.demo.rows import DATA_FOLDER, SPLITS, Split, read_split

ROWS = {split: read_split(split) for split in SPLITS}
COLUMNS = ["system", "question", "chosen", "rejected", "kind", "check"]


def test_the_set_has_the_promised_size() -> None:
    assert 400 <= len(ROWS["train"]) <= 600
    assert 80 <= len(ROWS["heldout"]) <= 120
    assert sum(path.stat().st_size for path in DATA_FOLDER.glob("*.jsonl")) <= 1_000_000


@pytest.mark.parametrize("split", SPLITS)
def test_every_chosen_passes_and_every_rejected_fails(split: Split) -> None:
    for row in ROWS[split]:
        assert list(row) == COLUMNS
        assert all(isinstance(value, str) for value in row.values())
        assert row["question"].strip()
        assert row["rejected"].strip()
        assert passes(row["check"], row["chosen"]), row
        assert not passes(row["check"], row["rejected"]), row


def test_answers_are_short() -> None:
    assert max(len(row["chosen"]) for row in ROWS["train"]) <= 160
    assert max(len(row["rejected"]) for row in ROWS["train"]) <= 240


@pytest.mark.parametrize("split", SPLITS)
def test_length_does_not_tell_the_chosen_answer(split: Split) -> None:
    """The longer answer is the chosen one as often as a coin would have it."""
    lengths = [(len(row["chosen"]), len(row["rejected"])) for row in ROWS[split]]
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    ties = sum(chosen == rejected for chosen, rejected in lengths)
    assert abs((longer + ties / 2) / len(lengths) - 0.5) < 1 / (2 * len(lengths) ** 0.5)  # a standard error


@pytest.mark.parametrize("split", SPLITS)
def test_check_has_nothing_to_warn_of(split: Split) -> None:
    settings = parse_check_settings([str(DATA_FOLDER / f"{split}.jsonl"), "--near_duplicates"])
    report = check(settings, Console(file=io.StringIO()))[0]
    assert not report.of(SPOILS)
    assert [finding.key for finding in report.of(NOTE)] in ([], ["near_duplicate_prompts"])  # wordings are shared


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_keeps_most_of_its_prompts(split: Split) -> None:
    counts = Counter(row["kind"] for row in ROWS[split])
    assert len(counts) == 17
    assert min(counts.values()) >= 0.6 * max(counts.values())


# --- training and held-out prompts are apart -----------------------------------------------------


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_no_heldout_question_is_in_training() -> None:
    trained = {_plain(row["question"]) for row in ROWS["train"]}
    assert not trained & {_plain(row["question"]) for row in ROWS["heldout"]}
    assert len(trained) == len(ROWS["train"])


def test_no_heldout_answer_of_an_extraction_was_an_answer_in_training() -> None:
    def answers(split: Split) -> set[str]:
        found = ("email", "date", "name", "json")
        return {row["chosen"] for row in ROWS[split] if row["kind"] in found}

    assert not answers("train") & answers("heldout")


def test_arithmetic_and_units_ask_for_other_numbers_in_the_heldout_set() -> None:
    def tasks(split: Split, kind: str) -> set[str]:
        patterns = {"arithmetic": r"\w+ (?:plus|minus) \w+", "units": r"\d+ \w+"}
        questions = [row["question"] for row in ROWS[split] if row["kind"] == kind]
        return {re.search(patterns[kind], question)[0].lower() for question in questions}

    for kind in ("arithmetic", "units"):
        assert not tasks("train", kind) & tasks("heldout", kind)
