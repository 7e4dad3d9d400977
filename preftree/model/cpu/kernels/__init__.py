"""Kernels of our own for the CPU in float32 and bfloat16, compiled for this machine when they are first needed.

It takes a C++ compiler (g++, clang++ or $CXX) a few seconds, once; the result lies in the cache folder. Without one,
everything that these kernels do is done in torch. The library is loaded only from a folder that nobody else can write
to (`io.private`), and only if it is what the compiler made: its hash lies beside it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import xxhash
from filelock import FileLock
from torch import Tensor

from preftree.errors import DeviceError
from preftree.io.atomic import atomic_file, atomic_path
from preftree.io.cache import cache_folder
from preftree.io.private import make_private, why_not_private
from preftree.io.processor import all_cpuinfo

HERE = Path(__file__).parent
SOURCES = ("attention.cpp", "elementwise.cpp", "softmax.cpp")
#: -fopenmp when compiling only: linked without it, the kernels take the OpenMP that torch has loaded, and its threads.
COMPILE = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
COMPILERS = ("g++", "clang++", "c++")
#: Kernels by name, with their signatures: p a pointer, i an int64, f a float.
SIGNATURES = {
    "preftree_forward": "ippppppp",
    "preftree_backward": "ippppppppppp",
    "preftree_swiglu": "iiippp",
    "preftree_swiglu_backward": "iiippppp",
    "preftree_rms": "iiiifpppp",
    "preftree_rms_backward": "iiiiipppppp",
    "preftree_exponentiate": "iiiippppp",
}
#: What the kernels' arrays may hold, and the flag that says so.
KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def addresses(*arrays: Tensor) -> list[int]:
    """Where arrays begin, as the kernels take them."""
    return [array.data_ptr() for array in arrays]


def library() -> ctypes.CDLL:
    """The compiled kernels, from the cache folder if they were compiled there before.

    Raises:
        DeviceError: no compiler, or it fails; with its last words.
    """
    found = _library()
    if isinstance(found, str):
        raise DeviceError(found)
    return found


def usable() -> bool:
    """Whether the kernels are available here."""
    return not isinstance(_library(), str)


def forget() -> None:
    """Look for the kernels anew at the next call."""
    _library.cache_clear()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The kernels or why there are none: a compiler that fails is not asked again."""
    try:
        return _load()
    except DeviceError as error:
        return str(error)


def _load() -> ctypes.CDLL:
    compiler = _compiler()
    # -march=native: the result belongs to one kind of processor, and home folders are shared.
    texts = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.[ch]*"))]
    made_of = (*texts, _version(compiler), *COMPILE, _processor())
    folder = cache_folder("kernels") / xxhash.xxh3_128_hexdigest("\0".join(made_of).encode())
    target = folder / "kernels.so"
    try:
        make_private(folder)
        _refuse_shared(folder)
        if not _is_whole(target):
            with FileLock(folder / "lock"):  # one of several ranks compiles, the others wait for it
                if not _is_whole(target):
                    _build(compiler, target)
        _refuse_shared(target)
        kernel = ctypes.CDLL(str(target))
    except OSError as error:
        raise DeviceError(f"the kernels cannot be kept in {folder} or loaded from there: {error}") from None
    for name, signature in SIGNATURES.items():
        function = getattr(kernel, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
    return kernel


def _refuse_shared(path: Path) -> None:
    if reason := why_not_private(path):
        raise DeviceError(
            f"kernels are loaded only from a folder of this user's own, and {reason}; set PREFTREE_CACHE to one"
        )


def _is_whole(target: Path) -> bool:
    """Whether the library is there and is what the compiler made."""
    try:
        return _hash_file(target).read_text(encoding="ascii") == _sha256(target)
    except OSError:
        return False


def _hash_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compiler() -> str:
    asked = os.environ.get("CXX")
    found = next((path for name in ((asked,) if asked else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise DeviceError(f"no C++ compiler ({asked or ', '.join(COMPILERS)}) to make the kernels with")
    return found


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    """What -march=native looks at, as far as it can be read."""
    wanted = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    # Of all processors: those of one Arm machine may be of several kinds.
    found = {f"{key}: {info[key]}" for info in all_cpuinfo() for key in wanted if key in info}
    return "\n".join([platform.machine(), *sorted(found)])


def _build(compiler: str, target: Path) -> None:
    """Compile and link; a build that is killed leaves nothing that would be loaded."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, atomic_path(target) as linked:
        objects = {HERE / source: f"{scratch}/{source}.o" for source in SOURCES}
        for source, made in objects.items():
            _run([compiler, *COMPILE, "-c", str(source), "-o", made])
        _run([compiler, "-shared", *objects.values(), "-o", str(linked)])
    with atomic_file(_hash_file(target), "w") as file:
        file.write(_sha256(target))


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"compiling the kernels: {error}") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise DeviceError(f"compiling the kernels with {command[0]} failed: {said}")
