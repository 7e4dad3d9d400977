"""A run killed at random moments ends with the bits of the undisturbed one. The long version is `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.driver import trials


@pytest.mark.parametrize(("ranks", "count"), [(1, 2), (2, 1)])
def test_killed_at_random_moments(tmp_path: Path, ranks: int, count: int) -> None:
    assert trials(tmp_path, count, seed=7, ranks=ranks) == count
