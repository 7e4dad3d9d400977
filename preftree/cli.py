"""The command line, `preftree --help`, and the entry point of dpo_clm.py: dispatch only.

Each command reads its own flags (`preftree.config`), which imports neither torch nor transformers, and then imports
its stage. What a user can fix ends with one message and exit code 2, a bug with its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from preftree import __version__
from preftree.config.parser import FlagParser
from preftree.distributed import gaudi, launcher
from preftree.errors import PreftreeError, SettingsError, Stopped
from preftree.hardware.limits import importing, out_of_memory
from preftree.io.cache import cache_parts, cache_root, clear_cache
from preftree.io.console import visible
from preftree.io.secrets import redacted

app = typer.Typer(
    name="preftree",
    help="Exact, fast preference optimization over token trees.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def guarded(stage: Callable[[], int | None]) -> int:
    """Run a stage: 0; 2 after one message for what the user can fix; 128 + its number after a signal."""
    try:
        return stage() or 0
    except Stopped as stopped:
        if launcher.is_first_rank():
            print(visible(str(stopped)), file=sys.stderr)
        return 128 + stopped.signal
    except PreftreeError as error:
        # Settings are wrong on all ranks alike; anything else may be one rank's own trouble.
        if launcher.is_first_rank() or not isinstance(error, SettingsError):
            print(f"error: {visible(redacted(str(error)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as problem:
        if not _is_out_of_memory(problem):
            raise
        print(f"error: {visible(out_of_memory(problem))}", file=sys.stderr)
        return 2


def _is_out_of_memory(problem: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(problem, MemoryError)
    from preftree.model.memory import is_out_of_memory

    return is_out_of_memory(problem)


def main_train(argv: Sequence[str]) -> int:
    """Train as the command line says; returns the exit code. `dpo_clm.py` and `preftree train` are this."""
    return guarded(lambda: _train(argv))


def _train(argv: Sequence[str]) -> int | None:
    from preftree.config.train import parse_settings

    settings = parse_settings(argv)
    gaudi.bootstrap(settings.train.use_lazy_mode)  # before torch is imported
    if settings.train.use_habana:
        gaudi.require_gaudi()
    if os.environ.get("RANK", "0") == "0":
        for note in [*launcher.advice(), *settings.notes]:
            print(f"note: {visible(note)}")
    with importing():
        from preftree.distributed.ranks import leave
        from preftree.train.run import train

    code = train(settings)
    leave()
    return code


def _prepare(argv: Sequence[str]) -> None:
    from preftree.config.prepare import parse_settings

    settings = parse_settings(argv)
    with importing():
        from preftree.prepare.run import prepare

    prepare(settings)


def _check(argv: Sequence[str]) -> int:
    from preftree.config.check import parse_check_settings

    parse_check_settings(argv)  # help and mistakes without the stage's imports
    from preftree.check.run import main

    return main(argv)


def _demo(argv: Sequence[str]) -> int:
    with importing():
        from preftree.demo.run import main

    return main(argv)


def _evaluate(argv: Sequence[str]) -> None:
    from preftree.config.evaluate import parse_evaluate

    settings = parse_evaluate(argv)
    if settings.export_data is not None:
        from preftree.evaluate.data import export

        return export(settings.export_data, settings.tasks)
    # lm-eval and torch take many seconds to import; a command that says nothing looks as if it hung.
    print(f"evaluate   {visible(settings.model)}: loading lm-eval and the model", file=sys.stderr, flush=True)
    _need_lm_eval()
    with importing():
        from preftree.evaluate.run import run

    return run(settings)


def _compare(argv: Sequence[str]) -> None:
    from preftree.config.evaluate import parse_compare

    settings = parse_compare(argv)
    from preftree.evaluate.compare import run

    run(settings.runs, settings.out, settings.seeds)


def _run(argv: Sequence[str]) -> int:
    from preftree.config.pipeline import parse_run

    settings = parse_run(argv)
    from preftree.pipeline.run import run

    return run(settings)


def _init(argv: Sequence[str]) -> None:
    from preftree.config.pipeline import parse_init

    settings = parse_init(argv)
    from preftree.pipeline.init import init

    init(settings)


def _sweep(argv: Sequence[str]) -> int:
    from preftree.config.sweep import parse_sweep

    settings = parse_sweep(argv)
    from preftree.sweep.run import sweep

    return sweep(settings)


def _report(argv: Sequence[str]) -> None:
    from preftree.config.report import parse_report

    settings = parse_report(argv)
    from preftree.report.run import report

    report(settings)


def _merge(argv: Sequence[str]) -> None:
    from preftree.config.merge import parse_merge

    settings = parse_merge(argv)
    from preftree.merge.run import run

    run(settings)


def _samples(argv: Sequence[str]) -> None:
    from preftree.config.answers import parse_samples

    settings = parse_samples(argv)
    from preftree.samples.run import run

    run(settings)


def _chat(argv: Sequence[str]) -> None:
    from preftree.config.answers import parse_chat

    settings = parse_chat(argv)
    from preftree.chat.run import run

    run(settings)


def _winrate(argv: Sequence[str]) -> None:
    from preftree.config.winrate import parse_winrate

    settings = parse_winrate(argv)
    from preftree.winrate.run import run

    run(*settings)


def _export(argv: Sequence[str]) -> None:
    from preftree.config.export import parse_export

    settings = parse_export(argv)
    from preftree.export.run import run

    run(settings)


def _watch(argv: Sequence[str]) -> None:
    from preftree.config.watch import parse_watch

    settings = parse_watch(argv)
    from preftree.report.watch import watch

    watch(settings)


def _lm_eval(argv: Sequence[str]) -> None:
    _need_lm_eval()
    with importing():
        from preftree.evaluate.harness import lm_eval_command

    try:
        lm_eval_command(list(argv))
    except ValueError as problem:  # lm-eval's own word for a task or model that it does not know
        raise SettingsError(f"lm-eval refuses this command line: {problem}") from problem


def _need_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise SettingsError("evaluation needs lm-eval: pip install 'preftree[eval]'")


#: Command -> the stage that reads the rest of the command line, and what --help of `preftree` says of it.
_STAGES: dict[str, tuple[Callable[[Sequence[str]], int | None], str]] = {
    "run": (_run, "Run a pipeline from data to report; what is done already is not done again."),
    "init": (_init, "Write a commented pipeline for a model and its data."),
    "prepare": (_prepare, "Make preference pairs from an instruction set."),
    "check": (_check, "Find what in preference data would spoil training."),
    "train": (_train, "Train a model by DPO."),
    "evaluate": (_evaluate, "Score a model on lm-eval's tasks and on held-out preference pairs."),
    "compare": (_compare, "Put evaluations side by side."),
    "sweep": (_sweep, "Train a grid of settings with one tokenization and one reference pass, and compare."),
    "report": (_report, "Say in plain words how training went: findings, curves, pairs, answers, in one file."),
    "chat": (_chat, "Talk to a base model and what training made of it, side by side."),
    "samples": (_samples, "Answers before and after training, differences marked."),
    "winrate": (_winrate, "Judge the answers of two models to the same prompts."),
    "merge": (_merge, "Merge an adapter into its base model, verified."),
    "export": (_export, "Write a run for llama.cpp, OpenVINO or Ollama."),
    "watch": (_watch, "Show the report of runs that go on in a browser, on this machine only."),
    "demo": (_demo, "Train the small bundled model on the bundled pairs and show what it learned."),
    "lm-eval": (_lm_eval, "lm-eval's own command line, in which --model preftree is known."),
}


class _Stage(TyperCommand):
    """A command that reads its flags itself, and lists them to the shell's completion."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        parser = parser_of(self.name or "")
        names = [f"--{name}" for name in sorted(parser.table)] if parser is not None else []
        # Any object with these three attributes; typer brings its own copy of click's class in some versions.
        return [SimpleNamespace(value=name, type="plain", help=None) for name in names if name.startswith(incomplete)]


#: Command -> module and function of its parser; a command that is not here has another's.
PARSERS = {
    "train": "train:parser",
    "prepare": "prepare:parser",
    "check": "check:parser",
    "evaluate": "evaluate:evaluate_parser",
    "compare": "evaluate:compare_parser",
    "report": "report:report_parser",
    "run": "pipeline:run_parser",
    "sweep": "sweep:sweep_parser",
    "watch": "watch:watch_parser",
    "init": "pipeline:init_parser",
    "chat": "answers:chat_parser",
    "samples": "answers:samples_parser",
    "winrate": "winrate:parser",
    "merge": "merge:parser",
    "export": "export:parser",
}


def parser_of(command: str) -> FlagParser | None:
    """The parser of a command, None for those that have another's."""
    if command not in PARSERS:
        return None
    module, _, function = PARSERS[command].partition(":")
    parser: FlagParser = getattr(import_module(f"preftree.config.{module}"), function)()
    return parser


def _add(name: str, stage: Callable[[Sequence[str]], int | None], summary: str) -> None:
    def command(context: typer.Context) -> None:
        raise typer.Exit(guarded(lambda: stage(context.args)))

    app.command(name, cls=_Stage, help=summary, context_settings=_PASS_ON, add_help_option=False)(command)


for _name, (_stage, _summary) in _STAGES.items():
    _add(_name, _stage, _summary)


@app.command()
def env() -> None:
    """Print what this machine is and which versions are installed, as JSON."""
    from preftree.hardware.environment import environment

    print(json.dumps(environment(), indent=2, ensure_ascii=False))


@app.command()
def cache(action: Annotated[str, typer.Argument(help="info or clear")] = "info") -> None:
    """Show what the caches hold (reference log-probs, evaluation answers, converted models), or delete them."""
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


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Exact, fast preference optimization over token trees."""


def main() -> None:
    """Entry point of the console script."""
    app()
