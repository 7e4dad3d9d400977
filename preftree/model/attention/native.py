"""Attention over trees in float32 by a kernel of our own, compiled for this machine when it is first needed.

`tree.cpp` keeps a block's weights in the processor's cache and skips all that is masked. It needs a C++ compiler
(g++, clang++ or $CXX) once; the result lies in the cache folder. Without one, and for other precisions, windows and
softcaps, `cpu.attend` does the same in torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from preftree.cache import cache_root
from preftree.errors import DeviceError
from preftree.forest import Forest
from preftree.model.attention import cpu
from preftree.model.attention.rules import Rules

SOURCE = Path(__file__).with_name("tree.cpp")
#: -fopenmp when compiling only: linked without it, the kernel takes the OpenMP that torch has loaded, and its threads.
COMPILE = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-c")
COMPILERS = ("g++", "clang++", "c++")


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """See `dense.attend`, whose values and gradients this matches; returns (T, H, D).

    Raises:
        DeviceError: the kernel cannot be compiled or loaded here.
    """
    kernel = library()
    size = query_HTD.shape[2]
    deepest = max(segment.position + segment.end - segment.start for segment in forest.segments)
    windowed = rules.window is not None and rules.window < deepest
    plain = not windowed and rules.softcap is None and query_HTD.dtype == torch.float32
    if not plain or query_HTD.device.type != "cpu" or size % kernel.preftree_vector_length():
        return cpu.attend(query_HTD, key_KTD, value_KTD, forest, rules)
    out_THD: Tensor = _KernelAttention.apply(query_HTD, key_KTD, value_KTD, forest, rules)
    return out_THD


class _Layout(ctypes.Structure):
    """`Forest` of tree.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "segments")),
        *((name, ctypes.c_void_p) for name in ("start", "end", "parent", "position")),
    ]


class _Shape(ctypes.Structure):
    """`Shape` of tree.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "size")),
        *((f"{what}_{of}", ctypes.c_int64) for what in ("query", "key", "value") for of in ("token", "head")),
        ("scale", ctypes.c_float),
        ("slopes", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


_layouts: weakref.WeakKeyDictionary[Forest, tuple[_Layout, Tensor]] = weakref.WeakKeyDictionary()


def _layout(forest: Forest) -> _Layout:
    """The segments as the kernel reads them, made once a forest."""
    if forest not in _layouts:
        columns = torch.tensor([(s.start, s.end, s.parent, s.position) for s in forest.segments]).T.contiguous()
        addresses = [column.data_ptr() for column in columns]
        _layouts[forest] = _Layout(len(forest), len(forest.segments), *addresses), columns
    return _layouts[forest][0]


def _shape(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, rules: Rules) -> _Shape:
    strides = [stride for x in (query_HTD, key_KTD, value_KTD) for stride in (x.stride(1), x.stride(0))]
    heads, _, size = query_HTD.shape
    slopes = rules.slopes_H.data_ptr() if rules.slopes_H is not None else None
    return _Shape(heads, key_KTD.shape[0], size, *strides, rules.scale, slopes, torch.get_num_threads())


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_HTD, key_KTD, value_KTD, forest: Forest, rules: Rules):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD = _rows(query_HTD), _rows(key_KTD), _rows(value_KTD)
        if rules.slopes_H is not None:
            rules = Rules(rules.scale, rules.window, rules.softcap, rules.slopes_H.float().contiguous())
        heads, tokens, size = query_HTD.shape
        out_THD, total_HT = query_HTD.new_empty(tokens, heads, size), query_HTD.new_empty(heads, tokens)
        shape = _shape(query_HTD, key_KTD, value_KTD, rules)
        arrays = (query_HTD, key_KTD, value_KTD, out_THD, total_HT)
        library().preftree_forward(ctypes.byref(_layout(forest)), ctypes.byref(shape), *_addresses(arrays))
        ctx.save_for_backward(*arrays)
        ctx.forest, ctx.rules = forest, rules
        return out_THD

    @staticmethod
    def backward(ctx, grad_THD):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD, out_THD, total_HT = ctx.saved_tensors
        grad_THD = grad_THD.contiguous()
        query_grad_THD = torch.empty_like(out_THD)
        key_grad_THD, value_grad_THD = torch.zeros_like(out_THD), torch.zeros_like(out_THD)
        shape = _shape(query_HTD, key_KTD, value_KTD, ctx.rules)
        library().preftree_backward(
            ctypes.byref(_layout(ctx.forest)),
            ctypes.byref(shape),
            *_addresses((query_HTD, key_KTD, value_KTD, out_THD, total_HT, grad_THD)),
            *_addresses((query_grad_THD, key_grad_THD, value_grad_THD)),
        )
        # The kernel adds up by query head, so that heads can be worked on side by side.
        key_grad_TKD, value_grad_TKD = (
            x.unflatten(1, (key_KTD.shape[0], -1)).sum(2) if len(key_KTD) < len(query_HTD) else x
            for x in (key_grad_THD, value_grad_THD)
        )
        return *(x.transpose(0, 1) for x in (query_grad_THD, key_grad_TKD, value_grad_TKD)), None, None


def _addresses(arrays: Sequence[Tensor]) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.data_ptr()) for array in arrays]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled kernel, from the cache folder if it was compiled there before.

    Raises:
        DeviceError: no compiler, or it fails; with its last words.
    """
    compiler = _compiler()
    # -march=native: the result belongs to one kind of processor, and home folders are shared.
    made_of = (SOURCE.read_text(encoding="utf-8"), _version(compiler), *COMPILE, _processor())
    folder = cache_root() / "kernels" / xxhash.xxh3_128_hexdigest("\0".join(made_of).encode())
    target = folder / "tree.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _build(compiler, target)
    try:
        kernel = ctypes.CDLL(str(target))
    except OSError as error:
        raise DeviceError(f"the attention kernel was compiled, but cannot be loaded: {error}") from None
    for function, pointers in ((kernel.preftree_forward, 7), (kernel.preftree_backward, 11)):
        function.argtypes, function.restype = [ctypes.c_void_p] * pointers, None
    return kernel


def _compiler() -> str:
    asked = os.environ.get("CXX")
    found = next((path for name in ((asked,) if asked else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise DeviceError(f"no C++ compiler ({asked or ', '.join(COMPILERS)}) to make the attention kernel with")
    return found


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    """What -march=native looks at, as far as it can be read."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _build(compiler: str, target: Path) -> None:
    """Compile and link beside the target and rename: processes that build at once do not disturb each other."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, linked = Path(folder) / "tree.o", Path(folder) / target.name
        for command in ([*COMPILE, str(SOURCE), "-o", str(made)], ["-shared", str(made), "-o", str(linked)]):
            try:
                done = subprocess.run([compiler, *command], capture_output=True, text=True, timeout=300, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise DeviceError(f"compiling the attention kernel: {error}") from None
            if done.returncode:
                said = " ".join(done.stderr.split())[-300:]
                raise DeviceError(f"compiling the attention kernel with {compiler} failed: {said}")
        os.replace(linked, target)
