"""What `preftree report` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse
from preftree.config.parser import Command, FlagParser, settings_of

REPORT_FORMATS = ("html", "md")


@dataclass
class ReportSettings:
    """Which runs are reported on, and where the report goes."""

    _argument_group_name: ClassVar[str] = "report"

    runs: list[str] = field(default_factory=list, metadata={"positional": True})
    """Output folders of training; several are drawn into the same curves."""
    out: str | None = None
    """The report's file; by default report.html (or report.md) in the first run's folder."""
    format: str = field(default="html", metadata={"choices": REPORT_FORMATS})
    """html, one page with everything in it; md, the findings and tables for model cards and pull requests."""
    compare: str | None = None
    """Folder that preftree compare wrote, whose table of scores is shown."""
    title: str | None = None
    """Heading of the report."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.runs:
            problems.append("name the run: preftree report RUN, the --output_dir of training.")
        one_of(problems, "format", self.format, REPORT_FORMATS)
        refuse(problems)


COMMAND = Command(
    name="report",
    summary="Say in plain words how training went, with curves, pairs and answers, in one file to share.",
    groups=(ReportSettings,),
    common=("runs", "out", "format", "compare", "title"),
    examples=(
        "preftree report outputs/mine",
        "preftree report outputs/a outputs/b --compare results/table --out both.html",
        "preftree report outputs/mine --format md",
    ),
)


@functools.cache
def report_parser() -> FlagParser:
    """The parser of `preftree report`."""
    return FlagParser(COMMAND)


def parse_report(argv: Sequence[str]) -> ReportSettings:
    """Read `RUN … --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(report_parser(), ReportSettings, argv)
