"""What a run is doing at each moment, told to whoever kills it, and kills that wait for one of these moments."""

from __future__ import annotations

import functools
import mmap
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from preftree.train.reference import Reference
from preftree.train.resumable import ResumableTrainer
from preftree.train.store import LogprobStore
from preftree.train.trainer import DPOTrainer

#: A phase -> the method that is it. Where one is within another, the inner one counts.
PHASES: Mapping[str, tuple[type, str]] = {
    "evaluation": (DPOTrainer, "evaluation_loop"),
    "reference pass": (Reference, "_pieces"),
    "checkpoint": (ResumableTrainer, "_save_checkpoint"),
    "step": (DPOTrainer, "training_step"),
    "caching": (LogprobStore, "flush"),
}
#: About how long each of them takes here.
SECONDS = {"evaluation": 0.03, "reference pass": 0.01, "checkpoint": 0.15, "step": 0.02, "caching": 0.005}
#: Before, between and after these.
OTHERWISE = "start or end"
_WIDTH = 64


def prepare(path: Path) -> None:
    """Make the file that the run will write its phase into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(OTHERWISE.encode().ljust(_WIDTH))


def read(path: Path) -> str:
    """The phase that a run was in when it ended."""
    return path.read_bytes().decode().strip()


def watch(path: Path, aim: tuple[str, int, float] | None) -> None:
    """Write each phase of this process into `path`, where a SIGKILL cannot take it back.

    Args:
        aim: die in this phase, at this entry into it, after so many seconds.
    """
    with open(path, "r+b") as file:
        shared = mmap.mmap(file.fileno(), _WIDTH)
    stack = [OTHERWISE]

    def now(phase: str) -> None:
        shared[:] = phase.encode().ljust(_WIDTH)

    for phase, (owner, name) in PHASES.items():
        setattr(owner, name, _watched(getattr(owner, name), phase, stack, now, aim))


def _watched(
    method: Callable[..., Any],
    phase: str,
    stack: list[str],
    now: Callable[[str], None],
    aim: tuple[str, int, float] | None,
) -> Callable[..., Any]:
    entries = 0

    @functools.wraps(method)
    def watched(*args: Any, **others: Any) -> Any:
        nonlocal entries
        entries += 1
        stack.append(phase)
        now(phase)
        if aim is not None and aim[:2] == (phase, entries):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process as SIGKILL does: nothing is run
            signal.setitimer(signal.ITIMER_REAL, max(aim[2], 1e-6))
        try:
            return method(*args, **others)
        finally:
            stack.pop()
            now(stack[-1])

    return watched
