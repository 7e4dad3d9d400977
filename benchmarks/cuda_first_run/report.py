"""What steps write and the run sums up: one JSON file per step, replaced whole after every finding."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


class StepReport:
    """The findings of one step, on disk after each of them: a step that is stopped loses nothing.

    Args:
        path: of the JSON file.
        seconds: what the step may take; see `left`.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.started, self.seconds = path, time.monotonic(), seconds
        self.content: dict[str, Any] = {"complete": False}
        self._write()

    def left(self) -> float:
        """Seconds until the step's limit."""
        return self.started + self.seconds - time.monotonic()

    def put(self, **values: Any) -> None:
        """Set values and write the file."""
        self.content.update(values)
        self._write()

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Append to a list and write the file."""
        self.content.setdefault(name, []).append(record)
        self._write()

    def finish(self) -> None:
        """The step has done all that it set out to do."""
        self.put(complete=True)

    def _write(self) -> None:
        self.content["took_s"] = round(time.monotonic() - self.started, 1)
        write(self.path, self.content)


def leave(code: int) -> NoReturn:
    """End the process at once: what libraries do at exit can take longer than a step, and its numbers are written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write(path: Path, content: Any) -> None:
    """Replace a JSON file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.partial")
    half.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(half, path)


def read(path: Path) -> dict[str, Any]:
    """A step's file, empty where it wrote none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
