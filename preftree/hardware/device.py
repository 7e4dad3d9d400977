"""Where to compute and in which precision, each choice with its reason, and what this machine is.

Nothing here guesses in silence: `choose_device` and `choose_dtype` return a `Choice` whose reason the caller
prints. `environment` is what a run folder keeps about the machine; it holds versions and hardware, never
names of users or hosts, and no environment variables.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psutil
import torch

from preftree.distributed.gaudi import require_gaudi
from preftree.errors import DeviceError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from preftree.config.train import Settings

T = TypeVar("T")

_PACKAGES = "preftree torch transformers peft accelerate datasets tokenizers safetensors numpy gguf trl"
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # x86, x86, Arm


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


def choose_device(settings: Settings) -> Choice[str]:
    """The device transformers' Trainer will use ('cpu', 'cuda:0', 'hpu:0', …).

    Raises DeviceError when --use_habana is given and the Gaudi stack is not there.
    """
    train = settings.train
    if train.use_habana:
        require_gaudi()
    device = str(train.device)  # found by TrainingArguments already; a second opinion could only disagree
    kind = kind_of(device)
    if kind == "cpu":
        missing = "no GPU or other accelerator was found"
        return Choice(kind, missing if train.cpu_by_default else "asked for by --use_cpu")
    if kind == "cuda":
        return Choice(device, f"{torch.cuda.get_device_name(device)}; --use_cpu would keep off it")
    if train.use_habana and kind != "hpu":
        raise DeviceError(f"--use_habana: the Gaudi software is installed, but no card answers; torch offers {device}.")
    return Choice(device, "the accelerator that torch found; --use_cpu would keep off it")


def choose_dtype(settings: Settings, device: str) -> Choice[torch.dtype]:
    """The precision of weights and activations on `device`.

    --torch_dtype wins. Otherwise --bf16 asks for bfloat16, --fp16 for float16, and neither for what is fast.
    A CPU that computes bfloat16 slower than float32 computes in float32; the reason says how much slower.
    """
    asked, train = settings.model.torch_dtype, settings.train
    kind = kind_of(device)
    if asked != "auto":
        return Choice(getattr(torch, asked), f"asked for by --torch_dtype {asked}")
    flag = "--bf16" if train.bf16 else "--fp16" if train.fp16 else None
    if kind == "cpu":
        return _cpu_dtype(flag)
    if flag:
        return Choice(torch.bfloat16 if train.bf16 else torch.float16, f"asked for by {flag}")
    return _fast_dtype(kind)


def inference_dtype(device: str, asked: str = "auto") -> Choice[torch.dtype]:
    """The precision for evaluation on `device`: as asked for by --dtype, or what is fast there.

    Raises SettingsError for a name that is no floating-point precision.
    """
    known = ("auto", "float32", "bfloat16", "float16", "float64")
    if asked not in known:
        raise SettingsError(f"--dtype {asked}: choose from {', '.join(known)}.{did_you_mean(asked, known)}")
    if asked != "auto":
        return Choice(getattr(torch, asked), f"asked for by --dtype {asked}")
    kind = kind_of(device)
    return _cpu_dtype(None) if kind == "cpu" else _fast_dtype(kind)


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


def _fast_dtype(kind: str) -> Choice[torch.dtype]:
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice(torch.float32, "this GPU has no native bfloat16; --fp16 asks for float16")
    if kind == "mps":
        return Choice(torch.float32, "the safe choice on Apple GPUs; --bf16 asks for bfloat16")
    return Choice(torch.bfloat16, f"native on this {kind} device; --torch_dtype float32 asks for full precision")


def _cpu_dtype(flag: str | None) -> Choice[torch.dtype]:
    native = cpu_bf16_instructions()
    speedup = bf16_speedup()
    measured = f"a bfloat16 matrix product takes {1 / speedup:.2g} x the time of a float32 one"
    if flag == "--fp16":
        return Choice(torch.float32, "--fp16 is for GPUs; --torch_dtype float16 forces it")
    # The instructions decide, so that all ranks and a resumed run choose alike; the clock can only veto.
    if native and speedup > 0.7:
        return Choice(torch.bfloat16, f"{flag or 'auto'}: this CPU has {native}; measured: {measured}")
    lacks = f"has {native}, yet is slow with it" if native else "has no bfloat16 instructions"
    reason = f"this CPU {lacks}; measured: {measured}"
    if flag:
        return Choice(torch.float32, f"--bf16 computes in float32, for {reason}. --torch_dtype bfloat16 forces it")
    return Choice(torch.float32, f"auto: {reason}")


@lru_cache(maxsize=1)
def cpu_bf16_instructions() -> str | None:
    """The CPU's bfloat16 instructions, as its flags name them, or None."""
    words = set(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())
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
    """Shortest time of a few products of square matrices; other work on the machine only ever adds."""
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(4):  # the first one sets up kernels
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)


def _backend(device: str) -> Any:
    """torch's module for a device that is not the CPU (torch.cuda, torch.xpu, torch.mps, torch.hpu), None if none."""
    kind = kind_of(device)
    return None if kind == "cpu" else getattr(torch, kind, None)


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


def gemm_peak(
    device: str,
    dtype: torch.dtype,
    seconds: float = 0.3,
    ready: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> float:
    """FLOP/s of a large matrix product, the best of several: what this device can do at all.

    Args:
        ready: of a weight (M, K): what makes (N, M) out of (N, K) with it; the fastest product that is at hand, so
            that nothing else can look better. None for torch's own.
    """
    size = 1536 if kind_of(device) == "cpu" else 8192
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = ready(weight) if ready is not None else partial(torch.nn.functional.linear, weight=weight)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        product(x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory it frees, to use it again; returns whether its C library can (glibc).

    A step frees and allocates gigabytes of activations. Given back in between, every page has to be fetched from the
    system anew: 2 of 14 seconds of a step here, and more where that goes through a hypervisor. Kept, forests of
    different sizes leave gaps between them. With `keep` false every tensor above 1 MiB is given back as soon as it is
    freed, so that the process never holds more than it uses.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    if not keep:
        return bool(mallopt(mmap_threshold, 2**20))
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))  # never shrink, map nothing apart


def total_memory(device: str = "cpu") -> int:
    """Bytes of memory this process may use at most; on the CPU a control group's limit counts."""
    if (memory := _device_memory(device)) is not None:
        return memory[1]
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_memory())])


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be allocated without pushing anything out; on a device with its allocator's reserve.

    Of a host's memory each of the ranks that run on it has an equal part: all of them ask at the same time.
    """
    if (memory := _device_memory(device)) is not None:
        return memory[0]
    free = [max(0, limit - used) for limit, used in _cgroup_memory()]
    return min([psutil.virtual_memory().available, *free]) // ranks_on_host()


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


def _cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each control group above this process that has a limit; versions 1 and 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, names = (root, ("memory.max", "memory.current", "inactive_file"))
        if controllers:
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        here = Path(path.lstrip("/"))
        for folder in dict.fromkeys([base / here, *(base / parent for parent in here.parents), base]):
            pair = _limit_and_use(folder, *names)
            if pair is not None:
                found.append(pair)
    return found


def _limit_and_use(folder: Path, limit_file: str, used_file: str, cache_key: str) -> tuple[int, int] | None:
    try:
        limit = int((folder / limit_file).read_text())  # "max" is no number
        used = int((folder / used_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return limit, max(0, used - int(stat.get(cache_key, 0)))  # file cache can be dropped


def environment() -> dict[str, Any]:
    """Versions and hardware that explain a result: JSON values, no user, host or environment variable."""
    info = _cpuinfo()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in _PACKAGES.split() if _version(name)},
        "commit": _commit(),
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
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


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
