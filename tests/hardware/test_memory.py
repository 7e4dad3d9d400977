"""Memory that this process may use: the machine's, its control groups', its ranks' share."""

from __future__ import annotations

import os
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


def test_freed_memory_is_given_back_behind_the_block() -> None:
    """In a process of its own, which takes 200 MB in pieces, frees them, and keeps them inside of the block only; then
    once more where the process as a whole keeps what it frees."""
    code = """
import psutil, sys
from preftree.hardware.memory import freed_memory_kept, keep_freed_memory
resident = lambda: psutil.Process().memory_info().rss / 1e6
before = resident()
with freed_memory_kept():
    pieces = [bytearray(2_000_000) for _ in range(100)]
    del pieces
    print(resident() - before > 150)
print(resident() - before < 50)
keep_freed_memory()
with freed_memory_kept():
    pieces = [bytearray(2_000_000) for _ in range(100)]
    del pieces
print(resident() - before > 150)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    glibc = platform.libc_ver()[0] == "glibc"
    assert done.stdout.split() == [str(glibc), "True", str(glibc)]


@pytest.mark.parametrize(("given", "expected"), [({}, "64"), ({"LRU_CACHE_CAPACITY": "9"}, "9")])
def test_compiled_products_are_bounded_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    """Before torch is imported: both caches read their variables at the first product."""
    code = "import os, sys, preftree.cli; assert 'torch' not in sys.modules; print(os.environ['LRU_CACHE_CAPACITY'])"
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
