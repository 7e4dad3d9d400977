"""A run killed at random moments ends with the bits of the undisturbed one. The long version is `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.driver import trials


@pytest.mark.long
def test_killed_on_one_rank(tmp_path: Path) -> None:
    found = trials(tmp_path, 2, seed=5, ranks=1, most_kills=2, pairs=43)
    assert found["bit-identical"] == 2
    # Each was killed at least once. In which phase is a matter of milliseconds; the long version counts them.
    assert sum(found.values()) - found["bit-identical"] >= 2


def test_killed_on_two_ranks(tmp_path: Path) -> None:
    assert trials(tmp_path, 1, seed=8, ranks=2, most_kills=2, pairs=43)["bit-identical"] == 1
