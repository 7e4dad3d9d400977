"""How much memory this process may use, and how much it has used."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from preftree.hardware.device import kind_of
from preftree.hardware.limits import Limit, memory_limits

#: Options of malloc.h, with glibc's defaults.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 2**10, _MMAP_THRESHOLD: 128 * 2**10, _MMAP_MAX: 2**16}
#: Was it decided for the whole process what becomes of freed memory?
_decided = False


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory it frees, for good, to use it again; returns whether its C library can (glibc).

    A step frees and allocates gigabytes of activations. Given back in between, every page has to be fetched from the
    system anew: 2 of 14 seconds of a step here, and more where that goes through a hypervisor. Kept, forests of
    different sizes leave gaps between them. With `keep` false every tensor above 1 MiB is given back as soon as it is
    freed, so that the process never holds more than it uses.
    """
    global _decided
    _decided = True
    return _keep_freed_memory(keep)


@contextmanager
def freed_memory_kept(keep: bool = True) -> Iterator[None]:
    """The same while the block lasts, then glibc's defaults, and what is free is given back.

    Does nothing where `keep_freed_memory` has decided for the whole process.
    """
    able = not _decided and _keep_freed_memory(keep)
    try:
        yield
    finally:
        if able:
            library = ctypes.CDLL(None)
            for option, default in _DEFAULTS.items():
                library.mallopt(option, default)
            library.malloc_trim(0)


def _keep_freed_memory(keep: bool) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    if not keep:
        return bool(mallopt(_MMAP_THRESHOLD, 2**20))
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_MAX, 0))  # never shrink, map nothing apart


def total_memory(device: str = "cpu") -> int:
    """Bytes of memory this process may use at most; on the CPU the limits on it count."""
    if (memory := _device_memory(device)) is not None:
        return memory[1]
    return min([psutil.virtual_memory().total, *(limit.size for limit in memory_limits())])


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be allocated without pushing anything out; on a device with its allocator's reserve.

    Of a host's memory each of the ranks that run on it has an equal part: all of them ask at the same time.
    """
    if (memory := _device_memory(device)) is not None:
        return memory[0]
    free, _ = _tightest()
    return free


def tightest_limit(device: str = "cpu") -> Limit | None:
    """The limit that decides how much is available; None where it is the memory of the host or the device."""
    return None if kind_of(device) != "cpu" else _tightest()[1]


def _tightest() -> tuple[int, Limit | None]:
    ranks = ranks_on_host()
    bounds: list[tuple[int, Limit | None]] = [(psutil.virtual_memory().available // ranks, None)]
    bounds += [(limit.free // (ranks if limit.shared else 1), limit) for limit in memory_limits()]
    return min(bounds, key=lambda bound: bound[0])


def ranks_on_host() -> int:
    """Ranks of this run that share this host, as the launcher says; 1 without one."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def room_for(limit: int | None) -> int:
    """Bytes of the CPU's memory that this process may still take, of `limit` in all if there is one."""
    free = available_memory()
    return free if limit is None else min(free, limit - psutil.Process().memory_info().rss)


def peak_memory(device: str = "cpu") -> int:
    """Most bytes this process has held at once: allocated memory on devices that count it, else resident memory."""
    peak_allocated = getattr(_backend(device), "max_memory_allocated", None)
    if peak_allocated is not None:
        return int(peak_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_memory(device: str) -> tuple[int, int] | None:
    """Free and total bytes of an accelerator, as far as torch can tell; None elsewhere."""
    backend = _backend(device)
    if hasattr(backend, "recommended_max_memory"):  # mps, which shares the machine's memory
        total = int(backend.recommended_max_memory())
        return max(0, total - int(backend.driver_allocated_memory())), total
    if not hasattr(backend, "mem_get_info"):
        return None
    free, total = backend.mem_get_info(device)
    reserve = (
        backend.memory_reserved(device) - backend.memory_allocated(device) if hasattr(backend, "memory_reserved") else 0
    )
    return int(free + reserve), int(total)


def _backend(device: str) -> Any:
    """torch's module for a device that is not the CPU (torch.cuda, torch.xpu, torch.mps, torch.hpu), None if none."""
    kind = kind_of(device)
    return None if kind == "cpu" else getattr(torch, kind, None)
