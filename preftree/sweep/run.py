"""`preftree sweep grid.yaml`: train each combination, then one report of all and a table with the best.

Runs share what does not depend on the grid: token ids and reference log-probs are kept on disk by content, so the
first run computes them and the others read them. A run that is complete is not trained again, and one that fails does
not end the sweep.
"""

from __future__ import annotations

import gc
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from preftree.config.report import ReportSettings
from preftree.config.sweep import SweepSettings
from preftree.errors import PreftreeError, RunError, Stopped
from preftree.io.atomic import atomic_file
from preftree.io.console import Say, next_steps, sayer
from preftree.report.read import read_run
from preftree.report.run import report
from preftree.sweep.choice import choose, table, write_choice
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
    trained = [run for run in grid.runs if run.name not in failed]
    done = [read_run(run.folder, run.name) for run in trained]
    if not done:
        raise RunError("every run of the sweep failed; the messages above say why.")
    text = table(done)
    with atomic_file(grid.output / "sweep.md", "w") as file:
        file.write(text)
    say(f"\n{text}")
    say(f"saved      {grid.output / 'sweep.md'}")
    choice = choose(done)
    write_choice(grid.output, trained, done, choice)
    folders = [str(run.folder) for run in done]
    report(ReportSettings(folders, out=str(grid.output / "report.html"), title=f"Sweep of {len(done)} runs"), console)
    if choice is not None:
        best = grid.output / "best.yaml"
        say(f"chosen     {choice.name}: {choice.reason}")
        next_steps(say, f"preftree train {shlex.quote(str(best))} --output_dir OUT")
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
    finally:
        gc.collect()  # the next run's model would be a second one in memory
    return True
