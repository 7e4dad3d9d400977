"""The functions of the Python API: what each command does, with its flags as keyword arguments.

`preftree.check`, `preftree.prepare` and `preftree.evaluate` are these functions and the packages of the same name at
once: the packages can be called (see `preftree.CallablePackage`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from preftree.check.report import Report
    from preftree.evaluate.compare import Comparison
    from preftree.evaluate.results import Run


def check(data: str | Path, **settings: Any) -> Report:
    """Find what in preference data would spoil training.

    Args:
        data: a file, a folder or a hub id.
        settings: flags of `preftree check`, such as `model_name_or_path` or `max_length`.

    Raises:
        PreftreeError: nothing can be read there, or a setting that cannot be used.
    """
    from preftree.check.html import write_html
    from preftree.check.run import check as run
    from preftree.config.check import parse_check_settings

    asked = parse_check_settings([str(data), *_words(settings)])
    report, _ = run(asked, Console(stderr=True))
    if asked.html:
        write_html(report, Path(asked.html))
    return report


def prepare(data: str | Path, output_dir: str | Path, **settings: Any) -> Path:
    """Make preference pairs from an instruction set; returns the file of pairs.

    Args:
        data: a file, a folder or a hub id with instructions and good answers.
        output_dir: where everything is kept; an interrupted run goes on from there.
        settings: flags of `preftree prepare`.

    Raises:
        PreftreeError: whatever the user can fix; what was done until then is kept.
    """
    from preftree.config.prepare import parse_settings
    from preftree.prepare.folder import PrepareFolder
    from preftree.prepare.run import prepare as run

    asked = parse_settings(_words({"dataset_name": data, "output_dir": output_dir, **settings}))
    run(asked)
    return PrepareFolder(str(output_dir), asked.output.output_format).pairs


def evaluate(model: str | Path, out: str | Path, **settings: Any) -> Run:
    """Score a model on lm-eval's tasks and on held-out preference pairs.

    Args:
        model: a folder, a hub id or "smollm2".
        out: folder for lm-eval's results and samples; must not hold others.
        settings: flags of `preftree evaluate`, such as `adapter`, `tasks` or `preferences`.

    Raises:
        PreftreeError: anything about settings, data or model that the user can fix.
    """
    from preftree.config.evaluate import parse_evaluate
    from preftree.evaluate.results import find_results
    from preftree.evaluate.run import run

    run(parse_evaluate(_words({"model": model, "out": out, **settings})))
    return find_results(str(out))


def compare(
    base: str | Path, *others: str | Path, out: str | Path | None = None, seeds: bool = False
) -> list[Comparison]:
    """Put evaluations side by side: scores, differences with 95 % intervals, questions that flipped.

    Args:
        base: folder of the evaluation to compare with.
        others: folders of the others.
        out: folder for compare.md and compare.json.
        seeds: each of the others holds evaluations of one recipe, a folder per seed.

    Raises:
        RunError: no evaluation in a folder, or settings that differ.
    """
    from preftree.evaluate.compare import run

    return run([str(base), *map(str, others)], None if out is None else str(out), seeds)


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as a command line; None stands for a flag that is not given."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, Mapping):
            value = json.dumps(value)
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words
