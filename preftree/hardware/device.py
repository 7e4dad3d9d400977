"""Where to compute, with the reason for the choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Generic, TypeVar

import torch

from preftree.errors import DeviceError

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value that was chosen and, in words, why."""

    value: T
    reason: str

    def __str__(self) -> str:
        return f"{str(self.value).removeprefix('torch.')}: {self.reason}"


def kind_of(device: str) -> str:
    """'cuda' of 'cuda:1'. Among several ranks the CPU has a number too and is no other device for it: cpu:0."""
    return device.partition(":")[0]


def find_accelerator() -> str | None:
    """The kind of accelerator that torch offers here ('cuda', 'hpu', 'mps', …), or None."""
    if torch.accelerator.is_available():
        return kind_of(str(torch.accelerator.current_accelerator()))
    from transformers.utils.import_utils import is_torch_hpu_available

    return "hpu" if is_torch_hpu_available() else None


def choose_device(asked: str = "auto", found: str | None = None) -> Choice[str]:
    """The device to compute on ('cpu', 'cuda:0', 'hpu:0', …), and why.

    Args:
        asked: the value of --device, a kind of device or "auto".
        found: the device that transformers has set up, with the number of this rank's card; None looks for one.

    Raises:
        DeviceError: a device that is asked for is not there.
    """
    device = found or find_accelerator() or "cpu"
    kind = kind_of(device)
    if asked == "cpu":
        return Choice("cpu", "asked for by --use_cpu")
    if asked not in ("auto", kind):
        there = "no accelerator" if kind == "cpu" else kind
        raise DeviceError(f"--device {asked}: torch finds {there} here. Leave the flag out, or take --device cpu.")
    if kind == "cpu":
        return Choice("cpu", "no GPU or other accelerator was found")
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "the accelerator that torch found"
    return Choice(device, f"{name}; --use_cpu avoids it")


def require_device(asked: str) -> None:
    """Raise DeviceError unless torch can put something on `asked`, the value of --device."""
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:  # unknown name, no driver, not built in
        first = str(problem).strip().partition("\n")[0]
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise DeviceError(
            f"--device {asked} cannot be used here: {first}. Here are {', '.join(there)}; without --device a GPU is "
            "taken if there is one"
        ) from problem


@cache
def gemm_peak(
    device: str,
    dtype: torch.dtype,
    seconds: float = 0.3,
    ready: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> float:
    """FLOP/s of a large matrix product, the best of several: what this device can do at all. Measured once per process.

    Args:
        ready: of a weight (M, K): what makes (N, M) out of (N, K) with it; the fastest product that is at hand, so
            that nothing else can look better. None for torch's own.
    """
    sizes = (1536,) if kind_of(device) == "cpu" else (2048, 8192)
    peak = 0.0
    for size in sizes:
        if peak and 2 * size**3 / peak > seconds:  # a slow device, busy enough with less
            break
        x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = ready(weight) if ready is not None else partial(torch.nn.functional.linear, weight=weight)
        product(x)[0, 0].item()  # waits for the device, and for all that is set up in a first product
        until = time.perf_counter() + seconds / len(sizes)
        while (start := time.perf_counter()) < until or not peak:
            product(x)[0, 0].item()
            peak = max(peak, 2 * size**3 / (time.perf_counter() - start))
    return peak
