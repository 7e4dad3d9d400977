"""What `preftree sweep` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import refuse
from preftree.config.parser import Command, FlagParser, settings_of


@dataclass
class SweepSettings:
    """Which grid is trained."""

    _argument_group_name: ClassVar[str] = "sweep"

    grid: str | None = field(default=None, metadata={"positional": True})
    """The file of the grid: output, grid (a list of values for each flag) and train (flags of all runs)."""
    dry_run: bool = False
    """Show the runs, and stop."""

    def __post_init__(self) -> None:
        refuse([] if self.grid else ["name the file of the grid: preftree sweep grid.yaml (see docs/pipeline.md)."])


COMMAND = Command(
    name="sweep",
    summary="Train every combination of a grid with one tokenization and one reference pass, and compare them.",
    groups=(SweepSettings,),
    common=("grid", "dry_run"),
    settings_file=False,
    examples=("preftree sweep grid.yaml", "preftree sweep grid.yaml --dry-run"),
)


@functools.cache
def sweep_parser() -> FlagParser:
    """The parser of `preftree sweep`."""
    return FlagParser(COMMAND)


def parse_sweep(argv: Sequence[str]) -> SweepSettings:
    """Read `FILE --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(sweep_parser(), SweepSettings, argv)
