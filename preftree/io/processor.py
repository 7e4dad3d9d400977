"""What the system says about the processor."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def processor_name() -> str:
    """The name it gives itself, with the family and model of an x86 processor: virtual machines often leave it out of
    the name which of a maker's processors they run on, and some of them are twice as fast as others."""
    info = cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    exact = [f"{word} {info[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in info]
    return f"{name} ({', '.join(exact)})" if exact else name
