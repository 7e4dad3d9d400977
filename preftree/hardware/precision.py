"""In which precision to compute: one policy for train, prepare and evaluate.

--dtype wins, then --bf16 and --fp16. Otherwise it is what is fast here: bfloat16 where the device computes it
natively, float32 everywhere else.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from preftree.hardware.device import Choice, kind_of
from preftree.io.processor import cpuinfo

_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # x86, x86, Arm


def choose_dtype(device: str, asked: str = "auto", *, bf16: bool = False, fp16: bool = False) -> Choice[torch.dtype]:
    """The precision of weights and activations on `device`, and why.

    A CPU that computes bfloat16 slower than float32 computes in float32; the reason says how much slower.

    Args:
        asked: the value of --dtype; "auto" leaves the choice to the flags below, or else to the device.
        bf16, fp16: --bf16 asks for bfloat16, --fp16 for float16.
    """
    if asked != "auto":
        return Choice(getattr(torch, asked), f"asked for by --dtype {asked}")
    kind = kind_of(device)
    flag = "--bf16" if bf16 else "--fp16" if fp16 else None
    if kind == "cpu":
        return _cpu_dtype(flag)
    if flag:
        return Choice(torch.bfloat16 if bf16 else torch.float16, f"asked for by {flag}")
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice(torch.float32, "this GPU has no native bfloat16; --dtype float16 asks for float16")
    if kind == "mps":
        return Choice(torch.float32, "the safe choice on Apple GPUs; --dtype bfloat16 asks for bfloat16")
    return Choice(torch.bfloat16, f"native on this {kind} device; --dtype float32 asks for full precision")


def _cpu_dtype(flag: str | None) -> Choice[torch.dtype]:
    native = cpu_bf16_instructions()
    speedup = bf16_speedup()
    measured = f"a bfloat16 matrix product takes {1 / speedup:.2g} x the time of a float32 one"
    if flag == "--fp16":
        return Choice(torch.float32, "--fp16 is for GPUs; --dtype float16 forces it")
    # The instructions decide, so that all ranks and a resumed run choose alike; the clock can only veto.
    if native and speedup > 0.7:
        return Choice(torch.bfloat16, f"{flag or 'auto'}: this CPU has {native}; measured: {measured}")
    lacks = f"has {native}, yet is slow with it" if native else "has no bfloat16 instructions"
    reason = f"this CPU {lacks}; measured: {measured}"
    if flag:
        return Choice(torch.float32, f"--bf16 computes in float32, for {reason}. --dtype bfloat16 forces it")
    return Choice(torch.float32, f"auto: {reason}")


@lru_cache(maxsize=1)
def cpu_bf16_instructions() -> str | None:
    """The CPU's bfloat16 instructions, as its flags name them, or None."""
    words = set(cpuinfo().get("flags", cpuinfo().get("Features", "")).split())
    found = next((flag for flag in _BF16_FLAGS if flag in words), None)
    if found is None and not words:  # no /proc: ask torch
        ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return "avx512_bf16" if ask is not None and ask() else None
    return found


@lru_cache(maxsize=1)
def bf16_speedup() -> float:
    """Time of a float32 matrix product over that of a bfloat16 one, measured here in about 0.1 s."""
    for size in (96, 256, 768):  # the largest that is not slow: emulated bfloat16 would take seconds
        slow = _product_seconds(size, torch.bfloat16)
        ratio = _product_seconds(size, torch.float32) / slow
        if slow > 0.002:
            break
    return ratio


def _product_seconds(size: int, dtype: torch.dtype) -> float:
    """Shortest CPU time of a few products of square matrices on one thread.

    CPU time of this thread, because a busy machine would be taken for a slow instruction: several threads that wait
    for one that is not scheduled were measured at 80 times the time, and runs then differed in their precision.
    """
    matrix = torch.ones(size, size, dtype=dtype)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(4):  # the first one sets up kernels
            start = time.thread_time()
            matrix @ matrix
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)
