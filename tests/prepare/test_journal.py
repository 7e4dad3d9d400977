"""What is left of a journal after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.errors import RunError
from preftree.prepare.journal import Journal


def test_every_torn_end_leaves_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path)
    journal.append("a", ["one\nline", "ünïcode \ud800"])
    journal.append("b", [2])
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = [0, 1, 2][(size >= first) + (size == len(content))]
        journal = Journal(path)
        assert len(journal) == whole
        assert ("a" in journal, "b" in journal) == (whole > 0, whole > 1)
        if "a" not in journal:
            journal.append("a", ["one\nline", "ünïcode \ud800"])
        if "b" not in journal:
            journal.append("b", [2])
        assert path.read_bytes() == content
    assert Journal(path)["a"] == ["one\nline", "ünïcode \ud800"]


@pytest.mark.parametrize("damage", [b'["b"\n', b'["b"]\n', b'{"b": 2}\n', b'"bc"\n', b"\xff\n"])
def test_a_damaged_line_is_told(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "j").write_bytes(b'["a", 1]\n' + damage + b'["c", 3]\n')
    with pytest.raises(RunError, match=r"is damaged .* Delete the file to ask again"):
        Journal(tmp_path / "j")
