"""What the tests of training by the real command share."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.cli import main_train
from tests.support.reruns import flags


@pytest.fixture(scope="session")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run from start to end, on a disk with room."""
    output = tmp_path_factory.mktemp("whole") / "O"
    assert main_train(flags(inputs, output)) == 0
    return output
