"""The file of a sweep: output folder, lists of values, flags of all runs; and the runs that it means."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftree.config.train import Settings, parse_settings
from preftree.errors import SettingsError, did_you_mean
from preftree.pipeline.file import read_mapping, words_of

_KEYS = ("output", "grid", "train", "launch")
_SHORT = {"learning_rate": "lr", "loss_type": "loss"}


@dataclass(frozen=True)
class SweptRun:
    """One combination.

    Args:
        flags: of `preftree train`, without the output folder.
        words: the same as a command line, with it.
    """

    name: str
    folder: Path
    flags: dict[str, Any]
    words: list[str]
    settings: Settings


@dataclass(frozen=True)
class Grid:
    """All runs of a sweep.

    Args:
        launch: words in front of each training command, such as torchrun's; none trains in this process.
    """

    output: Path
    runs: list[SweptRun]
    launch: list[str]


def read_grid(path: Path) -> Grid:
    """Read and check a file. Raises SettingsError with every problem found."""
    content = read_mapping(path, "'output', 'grid' and 'train'")
    problems = [f"{key} is no part of a sweep.{did_you_mean(str(key), _KEYS)}" for key in content if key not in _KEYS]
    axes, train = content.get("grid") or {}, content.get("train") or {}
    problems += [f"{key} is missing." for key in ("output", "grid", "train") if not content.get(key)]
    for name, value in (("grid", axes), ("train", train)):
        if not isinstance(value, Mapping):
            problems.append(f"{name}: write 'flag: value' lines below it.")
    if not problems:
        problems += [f"grid: {name} needs a list of values. Got {values!r}." for name, values in axes.items()
                     if not isinstance(values, list) or not values]  # fmt: skip
        problems += [f"train: {name} is in the grid as well." for name in axes if name in train]
        problems += [
            f"train: {name} is set by the sweep; leave it out." for name in ("output_dir", "out") if name in train
        ]
    if problems:
        raise SettingsError(*(f"{path}: {problem}" for problem in problems))
    output = Path(str(content["output"]))
    runs: list[SweptRun] = []
    for values in itertools.product(*axes.values()):
        _add_run(runs, output, dict(zip(axes, values, strict=True)), train, problems)
    if problems:
        raise SettingsError(*(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    return Grid(output, runs, str(content.get("launch") or "").split())


def _add_run(
    runs: list[SweptRun], output: Path, values: Mapping[str, Any], train: Mapping[str, Any], problems: list[str]
) -> None:
    name = ",".join(f"{_SHORT.get(key, key)}={_shown(value)}" for key, value in values.items())
    flags = {**train, **values}
    words = [*words_of(flags), "--output_dir", str(output / name)]
    try:
        settings = parse_settings(words)
    except SettingsError as error:
        problems += error.problems
        return
    if not settings.data.validation_file and not settings.data.validation_split_percentage:
        problems.append("runs are compared by held-out pairs: give a validation_file or a validation_split_percentage.")
    if not settings.train.reference_cache:
        problems.append("reference_cache false would compute the reference for every run: leave it out.")
    runs.append(SweptRun(name, output / name, flags, words, settings))


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value).replace("/", "_")
