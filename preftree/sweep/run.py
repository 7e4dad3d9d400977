"""`preftree sweep grid.yaml`: train each combination, then one report of all and a table with the best.

Runs share what does not depend on the grid: token ids and reference log-probs are kept on disk by content, so the
first run computes them and the others read them. A run that is complete is not trained again, and one that fails does
not end the sweep.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from preftree.config.report import ReportSettings
from preftree.config.sweep import SweepSettings
from preftree.errors import PreftreeError, RunError, Stopped
from preftree.io.atomic import atomic_file
from preftree.io.console import Say, sayer
from preftree.io.markdown import cell
from preftree.report.read import RunView, read_run
from preftree.report.run import report
from preftree.sweep.grid import Grid, SweptRun, read_grid
from preftree.train.run import train


def sweep(settings: SweepSettings, console: Console | None = None) -> int:
    """Train the grid; returns 0, or 1 where a run failed.

    Raises:
        PreftreeError: the file has mistakes, or every run failed.
    """
    console = console or Console(soft_wrap=True)
    say = sayer(console)
    grid = read_grid(Path(settings.grid or ""))
    say(f"sweep      {len(grid.runs)} runs into {grid.output}")
    if settings.dry_run:
        for run in grid.runs:
            say(f"           {run.name}")
        return 0
    failed = [run.name for number, run in enumerate(grid.runs, start=1) if not _train(run, grid, number, console, say)]
    done = [read_run(run.folder, run.name) for run in grid.runs if run.name not in failed]
    if not done:
        raise RunError("every run of the sweep failed; the messages above say why.")
    text = table(done)
    with atomic_file(grid.output / "sweep.md", "w") as file:
        file.write(text)
    say(f"\n{text}")
    say(f"saved      {grid.output / 'sweep.md'}")
    folders = [str(run.folder) for run in done]
    report(ReportSettings(folders, out=str(grid.output / "report.html"), title=f"Sweep of {len(done)} runs"), console)
    if failed:
        say(f"failed     {', '.join(failed)}: their messages are above; the same command tries them again")
    return int(bool(failed))


def _train(run: SweptRun, grid: Grid, number: int, console: Console, say: Say) -> bool:
    """Train one run; false where it failed."""
    say(f"\nrun {number}/{len(grid.runs)}  {run.name}")
    if grid.launch:
        return subprocess.run([*grid.launch, "-m", "preftree", "train", *run.words]).returncode == 0
    try:
        train(run.settings, console, commands=False)
    except Stopped:
        raise
    except PreftreeError as error:
        print(f"error: {run.name}: {error}", file=sys.stderr)
        return False
    return True


#: Heading, value of a run (NaN where it has none), format.
_COLUMNS: tuple[tuple[str, Callable[[RunView], float], str], ...] = (
    ("held-out accuracy", lambda run: run.evidence.last_evaluation("eval_rewards/accuracies"), ".3f"),
    ("length-controlled", lambda run: _or_nan(run.margins("eval").length_controlled_accuracy), ".3f"),
    ("held-out loss", lambda run: run.evidence.last_evaluation("eval_loss"), ".4f"),
    ("held-out margin", lambda run: run.evidence.last_evaluation("eval_rewards/margins"), "+.3f"),
)
#: The columns by which a best run is named: losses of different kinds cannot be compared.
_BEST = ("held-out accuracy", "length-controlled")


def table(runs: Sequence[RunView]) -> str:
    """The runs as Markdown, with the best by held-out accuracy and by length-controlled accuracy."""
    ordered = sorted(runs, key=lambda run: _rank(_COLUMNS[0][1](run)), reverse=True)
    headings = [heading for heading, *_ in _COLUMNS]
    lines = [f"| run | {' | '.join(headings)} | warnings |", "| --- |" + " ---: |" * len(headings) + " --- |"]
    for run in ordered:
        values = [f"{value:{form}}" if not math.isnan(value := read(run)) else "" for _, read, form in _COLUMNS]
        warnings = ", ".join(found.key for found in run.diagnoses if found.level == "warning")
        lines.append(f"| {cell(run.name)} | {' | '.join(values)} | {warnings} |")
    pairs = max(run.evidence.evaluated_pairs for run in runs)
    lines += ["", f"On {pairs} held-out pairs; an accuracy has a standard error of up to {_error(pairs):.3f}."]
    for heading, read, form in _COLUMNS:
        known = [run for run in runs if not math.isnan(read(run))]
        if heading in _BEST and known:
            best = max(known, key=read)
            lines.append(f"Best by {heading}: **{cell(best.name)}** ({read(best):{form}}).")
    return "\n".join(lines) + "\n"


def _rank(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _error(pairs: int) -> float:
    return 0.5 / math.sqrt(pairs) if pairs else math.nan
