"""What is left of a journal after a kill, and files that are there whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from preftree.errors import RunError
from preftree.prepare.journal import Journal, only_process, whole_file


def test_every_torn_end_leaves_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", ["one\nline", "ünïcode \ud800"])
        journal.append("b", [2])
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = [0, 1, 2][(size >= first) + (size == len(content))]
        with Journal(path) as journal:
            assert len(journal) == whole
            assert ("a" in journal, "b" in journal) == (whole > 0, whole > 1)
            if "a" not in journal:
                journal.append("a", ["one\nline", "ünïcode \ud800"])
            if "b" not in journal:
                journal.append("b", [2])
        assert path.read_bytes() == content
    with Journal(path) as journal:
        assert journal["a"] == ["one\nline", "ünïcode \ud800"]


def test_a_damaged_line_is_told(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b'["a", 1]\n["b"\n["c", 3]\n')
    with pytest.raises(RunError, match="line 2 is damaged"), Journal(tmp_path / "j"):
        pass


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half" * (1 // 0))
    assert list(path.parent.iterdir()) == []
    for text in (b"first", b"second"):
        with whole_file(path) as file:
            file.write(text)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == text


def test_two_processes_do_not_share_a_folder(tmp_path: Path, repo_root: Path) -> None:
    lock = tmp_path / "out" / ".prepare" / "lock"
    code = (
        "import sys, pathlib; from preftree.prepare.journal import only_process\n"
        "with only_process(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": repo_root}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="Another process is working in"), only_process(lock):
            pass
        other.kill()
    with only_process(lock):
        pass
