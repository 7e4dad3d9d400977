"""Rows of instruction sets under the columns that they are known with."""

from __future__ import annotations

from typing import Any

import pytest

from preftree.prepare.source import NO_QUESTION, SourceRow, _row


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Translate.", "input": "Die Kirsche"}, "Translate.\n\nDie Kirsche"),
        ({"instruction": "Translate.", "input": ""}, "Translate."),
        ({"instruction": "Translate.", "input": None}, "Translate."),
        ({"question": "Translate: Die Kirsche", "input": "Die Kirsche"}, "Translate: Die Kirsche"),
        ({"prompt": "Translate.", "input": "Die Kirsche"}, "Translate.\n\nDie Kirsche"),
    ],
)
def test_input_is_part_of_the_question(row: dict[str, Any], question: str) -> None:
    found = _row({**row, "output": "The cherry"}, 1, "made.jsonl")
    assert isinstance(found, SourceRow)
    assert found.question == question


def test_a_row_without_a_question() -> None:
    assert _row({"instruction": " ", "input": "", "output": "x"}, 1, "made.jsonl") == NO_QUESTION
