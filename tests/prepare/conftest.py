"""What the tests of `preftree prepare` share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.command import TEMPLATE
from tests.support.prepare import rows, write


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and 60 rows to select from."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.llama(num_hidden_layers=2).save_pretrained(folder / "model")
    tiny.word_tokenizer(TEMPLATE).save_pretrained(folder / "model")
    write(folder / "source.jsonl", rows(60))
    return folder
