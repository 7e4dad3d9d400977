"""Files that a run can do without: where one cannot be written, that is told once and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class OptionalWrites:
    """Writes of one kind.

    Args:
        say: where the first failure is told.
        consequence: what it means for the user.
    """

    say: Callable[[str], object]
    consequence: str
    failed: bool = field(default=False, init=False)

    def __call__(self, path: Path, write: Callable[[], object]) -> None:
        """Call `write`, which writes `path`."""
        try:
            write()
        except OSError as problem:
            if not self.failed:
                self.say(f"WARNING    {path} cannot be written ({problem.strerror or problem}); {self.consequence}")
            self.failed = True
