"""The command line, `preftree --help`, and the entry point of dpo_clm.py.

Only light modules are imported here; a stage brings its own when it runs. What a user can mend ends with one
message and exit code 2, a bug with its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from preftree import __version__
from preftree.distributed import gaudi, launcher
from preftree.errors import PreftreeError, SettingsError
from preftree.io.cache import cache_parts, cache_root, clear_cache
from preftree.io.console import visible

app = typer.Typer(
    name="preftree",
    help="Exact, fast preference optimization over token trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
#: `evaluate` takes --max_length as well as --max-length; the other stages have the first, as transformers does.
_EITHER = {"token_normalize_func": lambda name: name.replace("_", "-")}


def main_train(argv: Sequence[str]) -> int:
    """Train as the command line says; returns the exit code. `dpo_clm.py` and `preftree train` are this."""
    return guarded(lambda: _train(list(argv)))


def guarded(stage: Callable[[], int | None]) -> int:
    """Run a stage: 0, or 2 after one message for what the user can mend, or 130 after Ctrl-C."""
    try:
        return stage() or 0
    except PreftreeError as error:
        # Settings are wrong on all ranks alike; anything else may be one rank's own trouble.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, SettingsError):
            print(f"error: {visible(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(argv: list[str]) -> int | None:
    gaudi.bootstrap(argv)  # before torch is imported
    if gaudi.flag_is_on(argv, "use_habana"):
        gaudi.require_gaudi()
    from preftree.config.train import parse_settings

    settings = parse_settings(argv)
    if os.environ.get("RANK", "0") == "0":
        for note in [*launcher.advice(), *settings.notes]:
            print(f"note: {visible(note)}")
    from preftree.distributed.ranks import leave
    from preftree.train.run import train

    code = train(settings)
    leave()
    return code


@app.command(context_settings=_PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model by DPO: [settings.yaml] --flag value …; --help lists the flags."""
    raise typer.Exit(main_train(context.args))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def prepare(context: typer.Context) -> None:
    """Make preference pairs from an instruction set: [settings.yaml] --flag value …; --help lists the flags."""
    raise typer.Exit(guarded(lambda: _prepare(context.args)))


def _prepare(argv: list[str]) -> None:
    from preftree.config.prepare import parse_settings

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
    from preftree.hardware.environment import environment

    print(json.dumps(environment(), indent=2, ensure_ascii=False))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Train the small bundled model on the bundled pairs and show what it learned."""
    from preftree.demo.run import main as run_demo

    raise typer.Exit(guarded(lambda: run_demo(context.args)))


@app.command(context_settings=_EITHER)
def evaluate(
    model: Annotated[str, typer.Option(help="a folder, a hub id or smollm2")] = "",
    out: Annotated[str, typer.Option(help="folder for lm-eval's results and samples; must not hold others")] = "",
    adapter: Annotated[str | None, typer.Option(help="folder of a PEFT adapter on the model")] = None,
    tasks: Annotated[
        str, typer.Option(help="openllm (the leaderboard's four), or lm-eval's names, by commas")
    ] = "openllm",
    data: Annotated[str, typer.Option(help="hub, or a folder of local files (see docs/evaluation.md)")] = "hub",
    limit: Annotated[
        int | None, typer.Option(min=1, help="questions a task (of MMLU, a subject); for trying out")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="shots, instead of the leaderboard's")] = None,
    apply_chat_template: Annotated[bool, typer.Option(help="put questions into the model's chat template")] = False,
    dtype: Annotated[str, typer.Option(help="auto (what is fast here), float32, bfloat16, float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; by default a GPU if there is one")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="longest input, instead of the model's positions")
    ] = None,
    truncate: Annotated[bool, typer.Option(help="cut what is too long on its left instead of refusing")] = False,
    tokens_per_forest: Annotated[int | None, typer.Option(min=1, help="tokens of a forward pass")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="of generation; log-likelihoods need none")] = 1,
    preferences: Annotated[
        str | None, typer.Option(help="held-out pairs to score as well, in any of train's formats")
    ] = None,
    cache: Annotated[bool, typer.Option(help="take answers from earlier runs of this model, and keep new ones")] = True,
    export_data: Annotated[
        str | None, typer.Option(help="write the tasks' local files from the hub here, and stop")
    ] = None,
) -> None:
    """Score a model on lm-eval's tasks, every common beginning of their questions computed once."""
    asked = {name: value for name, value in locals().items() if name != "export_data"}
    raise typer.Exit(guarded(lambda: _evaluate(asked, export_data)))


def _evaluate(asked: dict[str, Any], export_data: str | None) -> None:
    if export_data is not None:
        from preftree.evaluate.data import export

        return export(export_data, asked["tasks"])
    if missing := [f"--{name} is missing" for name in ("model", "out") if not asked[name]]:
        raise SettingsError(*missing)
    # lm-eval and torch take many seconds to import; a command that says nothing looks as if it hung.
    print(f"evaluate   {visible(asked['model'])}: loading lm-eval and the model", file=sys.stderr, flush=True)
    _need_lm_eval()
    from preftree.evaluate.run import Evaluation, run

    return run(Evaluation(**asked))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="folders of evaluations, the one to compare with first")],
    out: Annotated[str | None, typer.Option(help="folder for compare.md and compare.json")] = None,
) -> None:
    """Put evaluations side by side: scores, differences with 95 % intervals, questions that flipped."""
    raise typer.Exit(guarded(lambda: _compare(runs, out)))


def _compare(runs: list[str], out: str | None) -> None:
    from preftree.evaluate.compare import run

    run(runs, out)


@app.command(name="lm-eval", context_settings=_PASS_ON, add_help_option=False)
def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line, in which --model preftree is known."""
    raise typer.Exit(guarded(lambda: _lm_eval(context.args)))


def _lm_eval(argv: list[str]) -> None:
    _need_lm_eval()
    from preftree.evaluate.harness import lm_eval_command

    lm_eval_command(argv)


def _need_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise SettingsError("evaluation needs lm-eval: pip install 'preftree[eval]'")


@app.command()
def cache(action: Annotated[str, typer.Argument(help="info or clear")] = "info") -> None:
    """Say what the caches hold (reference log-probs, evaluation answers, converted models), or delete them."""
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
