"""Two processes do not work in one output folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from preftree.errors import RunError
from preftree.io.lock import folder_lock


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path, repo_root: Path) -> None:
    lock = tmp_path / "out" / ".prepare" / "lock"
    code = (
        "import sys, pathlib; from preftree.io.lock import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1]), pathlib.Path('out')): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": repo_root}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"Another process is working in {tmp_path}"), folder_lock(lock, tmp_path):
            pass
        other.kill()
    with folder_lock(lock, tmp_path):
        pass


def test_a_lock_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used"), folder_lock(tmp_path / "file" / "lock", tmp_path):
        pass


def test_an_error_in_the_block_is_its_own_and_releases_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "lock", tmp_path):
            raise ZeroDivisionError
