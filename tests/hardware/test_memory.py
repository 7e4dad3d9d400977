"""Memory that this process may use: the machine's, its control groups', its ranks' share."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from preftree.hardware import memory
from preftree.hardware.memory import available_memory, peak_memory, total_memory


def test_memory_is_consistent() -> None:
    assert 0 < available_memory() <= total_memory()
    assert 10 * 2**20 < peak_memory() <= total_memory()


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    def group(folder: Path, limit: str, names: tuple[str, str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(limit)
        (folder / names[1]).write_text("500\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 200\n")

    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(tmp_path / "v2" / "a" / "b", "max\n", second)
    group(tmp_path / "v2" / "a", "1000\n", second)
    group(tmp_path / "v1" / "memory" / "a", "2000\n", first)
    (tmp_path / "me2").write_text("0::/a/b\n")
    (tmp_path / "me1").write_text("4:cpu:/a\n5:memory:/a\n")
    assert memory._cgroup_memory(tmp_path / "v2", tmp_path / "me2") == [(1000, 300)]
    assert memory._cgroup_memory(tmp_path / "v1", tmp_path / "me1") == [(2000, 300)]
    assert memory._cgroup_memory(tmp_path, tmp_path / "nowhere") == []


def test_a_control_group_lowers_total_and_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_cgroup_memory", lambda: [(1000, 300), (900, 850)])
    assert total_memory() == 900
    assert available_memory() == 50


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    """In a process of its own: the setting is the whole process's."""
    code = "from preftree.hardware.memory import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(platform.libc_ver()[0] == "glibc")]
