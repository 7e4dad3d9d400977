"""What the system lets this process take: control groups (versions 1 and 2) and `ulimit`. Imports no torch.

A control group's limit ends in a kill, one of `ulimit` in a failed allocation. `memory.high` of version 2 kills nobody,
but a process above it spends its time giving pages back, so it counts as a limit.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from preftree.errors import SettingsError

#: Memory that a process has with torch, transformers and peft imported (CPU build, torch 2.13), by the limit on it.
_IMPORTED = {"ulimit -v": 2.2 * 2**30, "ulimit -d": 1.5 * 2**30}
_PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Limit:
    """A limit in bytes and how much of it is used.

    Args:
        name: what a user would change to raise it.
        shared: other processes are counted as well, as in a control group.
    """

    name: str
    size: int
    used: int
    shared: bool = False

    @property
    def free(self) -> int:
        return max(0, self.size - self.used)


def memory_limits() -> list[Limit]:
    """Every limit on this process's memory."""
    return [*control_groups(), *process_limits()]


def process_limits() -> list[Limit]:
    """`ulimit -v` (all address space) and `ulimit -d` (data), where they are set."""
    try:
        pages = Path("/proc/self/statm").read_text().split()
        address_space, data = int(pages[0]) * _PAGE, int(pages[5]) * _PAGE
    except (OSError, ValueError, IndexError):  # not Linux
        return []
    asked = (("ulimit -v", resource.RLIMIT_AS, address_space), ("ulimit -d", resource.RLIMIT_DATA, data))
    found = [(name, resource.getrlimit(which)[0], used) for name, which, used in asked]
    return [Limit(name, size, used) for name, size, used in found if size != resource.RLIM_INFINITY]


@contextmanager
def importing() -> Iterator[None]:
    """Import torch in the block, or say in one sentence that a `ulimit` has no room for it.

    Raises:
        SettingsError: with what is needed.
    """
    limits = process_limits()
    for limit in limits:
        if limit.size < _IMPORTED[limit.name]:
            raise _no_room(limit)
    try:
        yield
    except (ImportError, OSError, MemoryError) as problem:
        if not limits or isinstance(problem, ModuleNotFoundError):
            raise
        raise _no_room(min(limits, key=lambda limit: limit.size)) from problem


def _no_room(limit: Limit) -> SettingsError:
    return SettingsError(
        f"{limit.name} allows this process {limit.size / 2**30:.2f} GiB, and torch and transformers alone take about "
        f"{_IMPORTED[limit.name] / 2**30:.1f} GiB of it before a model is loaded (more with a CUDA build). Raise it, "
        "or lift it and give --max_memory, which counts the memory that is really in use."
    )


def out_of_memory(problem: BaseException) -> str:
    """What to say where memory ran out for something that cannot be done in smaller pieces, as loading a model."""
    reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
    limits = sorted(memory_limits(), key=lambda limit: limit.free)
    if not limits:
        return f"Memory ran out ({reason}). Take a smaller model or a lower precision, or free memory on this machine."
    return (
        f"Memory ran out ({reason}). {limits[0].name} allows {limits[0].size / 2**30:.2f} GiB, of which "
        f"{limits[0].free / 2**30:.2f} GiB is left: raise it, or take a smaller model or a lower precision."
    )


def control_groups(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[Limit]:
    """Each control group above this process that has a limit; versions 1 and 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        base = root / "memory" if version == 1 else root
        here = Path(path.lstrip("/"))
        for folder in dict.fromkeys([base / here, *(base / parent for parent in here.parents), base]):
            found += _group_limits(folder, version)
    return found


#: Version -> files of limits, of what is used, and the key of droppable file cache in memory.stat.
_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def _group_limits(folder: Path, version: int) -> list[Limit]:
    limits, used_file, cache_key = _FILES[version]
    try:
        used = int((folder / used_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = max(0, used - int(stat.get(cache_key, 0)))
    except (OSError, ValueError):
        return []
    sizes = ((name, _number(folder / name)) for name in limits)
    return [Limit(f"{name} of the control group", size, used, shared=True) for name, size in sizes if size is not None]


def _number(path: Path) -> int | None:
    """What a limit's file says; None for "max", no file, and the huge number by which version 1 says "no limit"."""
    try:
        size = int(path.read_text())
    except (OSError, ValueError):
        return None
    return size if size < 2**62 else None


@contextmanager
def growth_within(size: int) -> Iterator[None]:
    """Let allocations in the block fail where the process would take more than `size` bytes beyond what it has."""
    pages = Path("/proc/self/statm")
    with allocations_within(int(pages.read_text().split()[1]) * _PAGE + size if pages.exists() else None):
        yield


@contextmanager
def allocations_within(size: int | None) -> Iterator[None]:
    """Let allocations in the block fail where the process would take more than `size` bytes of memory.

    What `--max_memory` promises cannot be kept by an estimate alone. The kernel counts writable memory from the moment
    it is allocated, so the present difference between that and resident memory is added. Lifted after the block: saving
    and logging must never fail for it. None and systems other than Linux limit nothing.
    """
    try:
        pages = [int(word) * _PAGE for word in Path("/proc/self/statm").read_text().split()]
    except (OSError, ValueError):
        size = None
    if size is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resident, data = pages[1], pages[5]
    wanted = data + max(0, size - resident)
    lowest = min(bound for bound in (wanted, soft, hard) if bound != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
