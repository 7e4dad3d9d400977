"""What the system says about the processor."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def all_cpuinfo() -> list[dict[str, str]]:
    """The entries of all logical processors in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    entries = ([line.split(":", 1) for line in entry.splitlines() if ":" in line] for entry in text.split("\n\n"))
    return [{key.strip(): value.strip() for key, value in entry} for entry in entries if entry]


def cpuinfo() -> dict[str, str]:
    """The first of them; empty where there is none."""
    return next(iter(all_cpuinfo()), {})


def processor_name() -> str:
    """The processor's name, on x86 with its family and model.

    Virtual machines often give one name ("AMD EPYC") to several generations, one of which may be twice as fast.
    """
    info = cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info and "model" in info:
        return f"{name} (family {info['cpu family']}, model {info['model']})"
    return name
