"""`preftree report RUN…`: read the runs, judge them, write one file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from preftree.config.report import ReportSettings
from preftree.errors import RunError
from preftree.health.findings import verdict
from preftree.io.atomic import atomic_file
from preftree.io.console import sayer
from preftree.report.content import scores
from preftree.report.markdown import markdown_report
from preftree.report.page import page
from preftree.report.read import read_runs


def report(settings: ReportSettings, console: Console | None = None) -> Path:
    """Write the report; returns its path.

    Raises:
        RunError: a folder without a run, a damaged one, or a file that cannot be written.
    """
    say = sayer(console or Console())
    runs = read_runs(settings.runs)
    found = scores(settings.compare)
    text = (markdown_report if settings.format == "md" else page)(runs, found, settings.title)
    path = Path(settings.out) if settings.out else runs[0].folder / f"report.{settings.format}"
    try:
        with atomic_file(path, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError as problem:
        why = problem.strerror or problem
        raise RunError(f"--out {path} cannot be written ({why}). Name another file.") from problem
    for run in runs:
        say(f"{'verdict':10} {run.name}: {verdict(run.diagnoses)}")
    say(f"report     {path}")
    return path
