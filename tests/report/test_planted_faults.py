"""Runs with a planted fault are diagnosed by name, and a healthy run has no warning; through the real command.

One seed here; `make test-faults` has three.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.health.findings import Level
from preftree.report.read import read_run
from tests.support.faults import FAULTS, train_with, write_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.faults), pytest.param(3, marks=pytest.mark.faults)]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, seed: int, model: Path, tmp_path: Path) -> None:
    view = read_run(train_with(fault, seed, model, tmp_path))
    warnings = {found.key for found in view.diagnoses if found.level is Level.WARNING}
    assert warnings == FAULTS[fault]
