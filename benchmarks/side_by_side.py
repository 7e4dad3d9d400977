"""What the benchmarks share: each side in a process of its own, its numbers on one line, its peak memory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MARK = "RESULT "


def answer(found: dict[str, Any]) -> None:
    """In the child: hand the numbers to the process that started it."""
    print(_MARK + json.dumps(found))


def kept_arguments(args: argparse.Namespace, *, but: Sequence[str]) -> dict[str, Any]:
    """The arguments as a report keeps them: `but` left out, files of this repository named from its root."""

    def shown(value: Any) -> Any:
        inside = isinstance(value, str) and Path(value).is_relative_to(ROOT)
        return str(Path(value).relative_to(ROOT)) if inside else value

    return {name: shown(value) for name, value in vars(args).items() if name not in but}


def fresh_process(command: Sequence[str], name: str, show_errors: bool = False) -> dict[str, Any]:
    """Run `command` with this Python and return what it gave `answer`; exits with its last words if it fails.

    Args:
        show_errors: let the child write to this process's standard error as it goes.
    """
    errors = None if show_errors else subprocess.PIPE
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        words = "" if done.stderr is None else f":\n{done.stderr[-4000:]}"
        sys.exit(f"{name} failed with exit code {done.returncode}{words}")
    return dict(json.loads(lines[-1].removeprefix(_MARK)))


class PeakMemory:
    """Most resident memory of this process while it is open, read twenty times a second."""

    def __enter__(self) -> PeakMemory:
        import psutil

        self.peak, self._process, self._stop = 0, psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
