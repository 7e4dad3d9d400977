"""The command line: `preftree prepare | check | train | env | demo | version`, and the entry point of dpo_clm.py.

Only light modules are imported here; a stage brings its own when it runs. What a user can mend ends with one
message and exit code 2, a bug with its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from preftree import __version__, gaudi
from preftree.cache import cache_parts, cache_root, clear_cache
from preftree.errors import PreftreeError, SettingsError

app = typer.Typer(
    name="preftree",
    help="Exact, fast preference optimization over token trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main_train(argv: Sequence[str]) -> int:
    """Train as the command line says; returns the exit code. `dpo_clm.py` and `preftree train` are this."""
    return guarded(lambda: _train(list(argv)))


def guarded(stage: Callable[[], int | None]) -> int:
    """Run a stage: 0, or 2 after one message for what the user can mend, or 130 after Ctrl-C."""
    try:
        return stage() or 0
    except PreftreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(argv: list[str]) -> int | None:
    gaudi.bootstrap(argv)  # before torch is imported
    if gaudi.flag_is_on(argv, "use_habana"):
        gaudi.require_gaudi()
    from preftree.settings import parse_settings

    settings = parse_settings(argv)
    if os.environ.get("RANK", "0") == "0":
        for note in settings.notes:
            print(f"note: {note}")
    from preftree.train.run import train

    return train(settings)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model by DPO: [settings.yaml] --flag value …; --help lists the flags."""
    raise typer.Exit(main_train(context.args))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def prepare(context: typer.Context) -> None:
    """Make preference pairs from an instruction set: [settings.yaml] --flag value …; --help lists the flags."""
    raise typer.Exit(guarded(lambda: _prepare(context.args)))


def _prepare(argv: list[str]) -> None:
    from preftree.prepare.settings import parse_settings

    settings = parse_settings(argv)
    from preftree.prepare.run import prepare as run_prepare

    run_prepare(settings)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def check(context: typer.Context) -> None:
    """Find what in preference data would spoil training: PATH --flag value …; --help lists the flags."""
    raise typer.Exit(guarded(lambda: _check(context.args)))


def _check(argv: list[str]) -> int:
    from preftree.check.run import main as run_check

    return run_check(argv)


@app.command()
def env() -> None:
    """Print what this machine is and which versions are installed, as JSON."""
    from preftree.device import environment

    print(json.dumps(environment(), indent=2, ensure_ascii=False))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Train the small bundled model on the bundled pairs and show what it learned."""
    from preftree.demo.run import main as run_demo

    raise typer.Exit(guarded(lambda: run_demo(context.args)))


@app.command()
def cache(action: Annotated[str, typer.Argument(help="info or clear")] = "info") -> None:
    """Say what the caches hold (reference log-probs, converted models), or delete them."""
    raise typer.Exit(guarded(lambda: _cache(action)))


def _cache(action: str) -> None:
    if action not in ("info", "clear"):
        raise SettingsError(f"preftree cache {action}: choose info or clear.")
    parts = clear_cache() if action == "clear" else cache_parts()
    print(f"{cache_root()}: {'deleted' if action == 'clear' else 'holds'} {'' if parts else 'nothing'}".rstrip())
    for part in parts:
        print(f"  {part.name:10} {part.size / 2**20:8.1f} MiB in {part.files} files, {part.entries} entries")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Entry point of the console script."""
    app()
