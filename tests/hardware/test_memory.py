"""Memory that this process may use: the machine's, its control groups', its ranks' share."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from preftree.hardware import memory
from preftree.hardware.limits import Limit
from preftree.hardware.memory import available_memory, peak_memory, tightest_limit, total_memory


def test_memory_is_consistent() -> None:
    assert 0 < available_memory() <= total_memory()
    assert 10 * 2**20 < peak_memory() <= total_memory()


def test_a_limit_lowers_total_and_available(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [Limit("one", 1000, 300, shared=True), Limit("other", 900, 850)]
    monkeypatch.setattr(memory, "memory_limits", lambda: limits)
    assert total_memory() == 900
    assert available_memory() == 50
    assert tightest_limit() == limits[1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "20")  # which share a control group and not an address space
    assert available_memory() == 35
    monkeypatch.setattr(memory, "memory_limits", list)
    assert tightest_limit() is None


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    """In a process of its own: the setting is the whole process's."""
    code = "from preftree.hardware.memory import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(platform.libc_ver()[0] == "glibc")]
