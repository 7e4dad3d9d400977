"""Families of different construction, measured as scripts/model_coverage.py measures all of them (docs/models.md)."""

from __future__ import annotations

import dataclasses

import pytest

from scripts import model_coverage as coverage
from scripts.coverage_table import Row, document
from tests.support import families

pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


@pytest.mark.parametrize("family", coverage.SHORT)
def test_log_probs_and_gradients_are_those_of_single_sequences(family: str) -> None:
    row = coverage.examine(family, [coverage.measure])
    assert row.path, row.reason
    assert row.half_path, row.reason
    assert not row.problems


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "falcon", "seed_oss", "llama4_text", "nemotron_h"])
def test_default_flags_train_and_start_at_ln_2(family: str) -> None:
    row = coverage.examine(family, [coverage.train])
    assert row.trains, row.reason
    assert not row.problems


def test_what_is_refused_is_said_in_words() -> None:
    row = coverage.examine("bert, encoder")
    assert not row.traceback
    assert not row.trains
    assert "depends on later tokens" in row.reason


def test_a_row_says_what_it_misses() -> None:
    row = Row("x", logprob_error=0.1, half_error=4.0, half_noise=1.0, first_loss=0.7, traceback="…")
    assert row.problems == [
        "ends in a traceback",
        "log-probs off by 0.1 in float32",
        "log-probs off by 4.0 times the model's own rounding in bfloat16",
        "first loss 0.700000",
    ]
    chaotic = Row("z", gradient_error=2e-4, gradient_noise=1e-4, logprob_error=2e-4, logprob_noise=1e-5)
    assert chaotic.problems == ["log-probs off by 0.0002 in float32"]
    good = Row("y", "native", 1e-6, 1e-6, 1e-6, 1e-6, "native", 0.1, 0.1, 0.1, 0.1, 0.693147, True)
    assert not good.problems
    text = document([row, good, dataclasses.replace(good, commit="abc")], 3)
    assert "3 of 3 families and variants" in text
    assert "x." in text
    assert "at commits (rows)  (2), abc (1)" in text
    assert "| y | native | 1e-06 (1e-06) | 1e-06 (1e-06) | 0.1 (0.1) | 0.1 (0.1) | yes |  |" in text


def test_the_short_list_is_of_known_families() -> None:
    assert set(coverage.SHORT) <= set(families.all_families())
