"""What `preftree watch` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import refuse, within
from preftree.config.parser import Command, FlagParser, settings_of


@dataclass
class WatchSettings:
    """Which runs are watched, and where."""

    _argument_group_name: ClassVar[str] = "watch"

    runs: list[str] = field(default_factory=list, metadata={"positional": True})
    """Output folders of training, which may still be going on."""
    port: int = 8765
    """Port on this machine's loopback interface; 0 takes a free one."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.runs:
            problems.append("name the run: preftree watch RUN, the --output_dir of training.")
        within(problems, "port", self.port, 0, 65535)
        refuse(problems)


COMMAND = Command(
    name="watch",
    summary="Show the report of runs that go on in a browser, with new points as they come; on this machine only.",
    groups=(WatchSettings,),
    common=("runs", "port"),
    examples=("preftree watch outputs/mine", "preftree watch outputs/a outputs/b --port 9000"),
)


@functools.cache
def watch_parser() -> FlagParser:
    """The parser of `preftree watch`."""
    return FlagParser(COMMAND)


def parse_watch(argv: Sequence[str]) -> WatchSettings:
    """Read `RUN … --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(watch_parser(), WatchSettings, argv)
