"""What this machine is and which versions are installed: what a run folder keeps to explain a result.

Versions and hardware only, never names of users or hosts, and no environment variables.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from preftree.hardware.memory import total_memory
from preftree.hardware.precision import cpu_bf16_instructions
from preftree.io.processor import processor_name

_PACKAGES = "preftree torch transformers peft accelerate datasets tokenizers safetensors numpy gguf trl"


def environment() -> dict[str, Any]:
    """Versions and hardware that explain a result: JSON values, no user, host or environment variable."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in _PACKAGES.split() if _version(name)},
        "commit": _commit(),
        "cpu": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": cpu_bf16_instructions(),
        "cores": psutil.cpu_count(logical=False),
        "threads": {
            "logical": psutil.cpu_count(),
            "usable": _usable_cpus(),
            "torch": torch.get_num_threads(),
        },
        "memory_gib": round(total_memory() / 2**30, 1),
        "cuda": torch.version.cuda,
        "devices": _devices(),
    }


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": card.name, "memory_gib": round(card.total_memory / 2**30, 1)} for card in cards]


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout ('…+changes' when tracked files differ from it), None when installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5)
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=5).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit = head.stdout.strip()
    return (commit if clean else f"{commit}+changes") if commit else None
