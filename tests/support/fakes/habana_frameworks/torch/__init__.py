"""Puts `torch.hpu` in place when it is imported, as the real package does."""

from __future__ import annotations

import atexit
import json
import os
import sys
import types
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

calls: Counter[str] = Counter()


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "hpu":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "hpu":
        return "cpu"
    return value


class _OnCpu(TorchFunctionMode):
    """Every function of torch finds the CPU where it is told hpu."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # a name may be made; it is where it is used that the CPU stands in
            return func(*args, **(kwargs or {}))
        replaced = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*(_on_cpu(value) for value in args), **replaced)


def _module() -> types.ModuleType:
    hpu, random = types.ModuleType("torch.hpu"), types.ModuleType("torch.hpu.random")

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    for name in ("set_device", "synchronize", "manual_seed", "manual_seed_all", "reset_peak_memory_stats"):
        setattr(hpu, name, nothing)
    for place in (hpu, random):
        place.get_rng_state = lambda *device: torch.get_rng_state()  # type: ignore[attr-defined]
        place.get_rng_state_all = lambda: [torch.get_rng_state()]  # type: ignore[attr-defined]
        place.set_rng_state = place.set_rng_state_all = nothing  # type: ignore[attr-defined]
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "mem_get_info": (2**30, 2**31),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 2**20,
    }
    for name, answer in answers.items():
        setattr(hpu, name, lambda *device, answer=answer: answer)
    hpu.random = random  # type: ignore[attr-defined]
    return hpu


def _write() -> None:
    if path := os.environ.get("FAKE_HABANA_LOG"):
        with open(f"{path}.{os.environ.get('RANK', '0')}", "w") as file:
            json.dump(calls, file)


torch.hpu = sys.modules["torch.hpu"] = _module()  # type: ignore[attr-defined]
_OnCpu().__enter__()
atexit.register(_write)
