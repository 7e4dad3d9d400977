"""A pipeline's file: model, data, output folder, and one section of flags per stage; all mistakes are found at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from preftree.config.check import parse_check_settings
from preftree.config.evaluate import parse_evaluate
from preftree.config.pipeline import STAGES
from preftree.config.prepare import parse_settings as parse_prepare
from preftree.config.report import parse_report
from preftree.config.train import parse_settings as parse_train
from preftree.errors import SettingsError, did_you_mean

#: Keys beside the stages, and whether a pipeline needs them.
KEYS = {"output": True, "model": True, "data": True, "heldout": False}
#: Flags that the pipeline itself sets, by stage.
_SET_HERE = {
    "prepare": ("dataset_name", "output_dir"),
    "check": ("dataset_name", "model_name_or_path", "html"),
    "train": ("dataset_name", "model_name_or_path", "output_dir", "validation_file"),
    "evaluate": ("model", "adapter", "out", "preferences"),
    "report": ("runs", "out", "compare"),
}
#: A command line of each stage with what it cannot do without, to try the flags of a section.
_TRIALS: dict[str, tuple[Callable[[Sequence[str]], object], list[str]]] = {
    "prepare": (parse_prepare, ["--dataset_name", "D", "--output_dir", "O"]),
    "check": (parse_check_settings, ["D", "--model_name_or_path", "M"]),
    "train": (parse_train, ["--dataset_name", "D", "--model_name_or_path", "M", "--output_dir", "O"]),
    "evaluate": (parse_evaluate, ["--model", "M", "--out", "O"]),
    "report": (parse_report, ["R"]),
}


@dataclass(frozen=True)
class Pipeline:
    """What a file says.

    Args:
        heldout: preference pairs that are validated on and scored before and after; None for none.
        flags: of each stage that is to run, as words of its command line.
        launch: words in front of the training command, such as torchrun's.
    """

    output: Path
    model: str
    data: str
    heldout: str | None
    flags: Mapping[str, list[str]]
    launch: Sequence[str] = ()


def read_pipeline(path: Path) -> Pipeline:
    """Read and check a file. Raises SettingsError with every problem found."""
    content = read_mapping(path, "'output', 'model', 'data' and a section per stage")
    problems = _key_problems(content)
    flags: dict[str, list[str]] = {}
    launch: list[str] = []
    for stage in STAGES:
        section = content.get(stage, False)
        if section is False or (section is None and stage not in content):
            continue
        if not isinstance(section, dict | None):
            problems.append(f"{stage}: write 'flag: value' lines below it, or nothing. Got {section!r}.")
            continue
        section = dict(section or {})
        launch += str(section.pop("launch", "")).split() if stage == "train" else []
        flags[stage] = words_of(section)
        problems += _section_problems(stage, section, flags[stage])
    if "train" not in flags:
        problems.append("train: the section is missing; 'train:' alone trains with the defaults.")
    if problems:
        raise SettingsError(*(f"{path}: {problem}" for problem in problems))
    heldout = content.get("heldout")
    return Pipeline(Path(content["output"]), str(content["model"]), str(content["data"]),
                    str(heldout) if heldout else None, flags, launch)  # fmt: skip


def read_mapping(path: Path, what: str) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises SettingsError where there is none; `what` says what it should hold."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise SettingsError(f"{path} cannot be read: {problem.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise SettingsError(f"{path} is not YAML{where}.") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold {what}.")
    return content


def _key_problems(content: Mapping[Any, Any]) -> list[str]:
    known = [*KEYS, *STAGES]
    problems = [
        f"{key} is no part of a pipeline.{did_you_mean(str(key), known)}" for key in content if key not in known
    ]
    problems += [f"{key} is missing." for key, needed in KEYS.items() if needed and not content.get(key)]
    texts = [key for key in KEYS if content.get(key) and not isinstance(content[key], str | int | float)]
    return problems + [f"{key} must be a text. Got {content[key]!r}." for key in texts]


def _section_problems(stage: str, section: Mapping[str, Any], words: list[str]) -> list[str]:
    own = [name for name in section if str(name).replace("-", "_") in _SET_HERE[stage]]
    problems = [f"{stage}: {name} is set by the pipeline; leave it out." for name in own]
    if own:
        return problems
    parse, needed = _TRIALS[stage]
    try:
        parse([*needed, *words])
    except SettingsError as error:
        problems += [f"{stage}: {problem}" for problem in error.problems]
    return problems


def words_of(section: Mapping[str, Any]) -> list[str]:
    """A section as words of a command line."""
    words = []
    for name, value in section.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
    return words
