"""A run killed at random moments ends with the bits of the undisturbed one. The long version is `make chaos`."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.driver import trials


def test_killed_on_one_rank(tmp_path: Path) -> None:
    found = trials(tmp_path, 2, seed=5, ranks=1, most_kills=2)
    assert found["bit-identical"] == 2
    # The first kill of each is aimed at a phase; one that is over sooner than usual leaves it to the phase after it.
    assert found["evaluation"] + found["checkpoint"] + found["step"]
    assert found["reference pass"] + found["caching"] + found["step"]


def test_killed_on_two_ranks(tmp_path: Path) -> None:
    assert trials(tmp_path, 1, seed=8, ranks=2, most_kills=2)["bit-identical"] == 1
