"""Which tasks to run, with how many shots, on which rows: lm-eval task files that include lm-eval's own.

The leaderboard's table is four tasks with fixed numbers of shots (`preftree.benchmarks`). lm-eval's own files leave the
shots open and download the rows; the files written here set the one and replace the other, nothing else. lm-eval reads
them through `--include_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager

from preftree.benchmarks import BY_TASK, SUITES, expand_tasks
from preftree.errors import SettingsError, did_you_mean
from preftree.evaluate.data import read_splits, subjects

OWN_TASKS = Path(lm_eval.tasks.__file__).parent


def expand(asked: str) -> list[str]:
    """Task names from `--tasks`: separated by commas, `openllm` for the leaderboard's four."""
    found = expand_tasks([name.strip() for name in asked.split(",") if name.strip()])
    if not found:
        raise SettingsError("--tasks is empty; give openllm, or names of lm-eval's tasks separated by commas")
    return found


def plan_tasks(names: Sequence[str], folder: Path, data: str, num_fewshot: int | None = None) -> TaskManager:
    """lm-eval's task manager for `names`, their files written into `folder`.

    Args:
        data: "hub", or a folder of local files (see `data`).
        num_fewshot: number of shots for all tasks, None for the leaderboard's.

    Raises:
        SettingsError: tasks that are unknown, or that have no local form.
        DataError: local files that are missing or broken.
    """
    local = None if data == "hub" else data
    if local is not None and (without := [name for name in names if name not in BY_TASK]):
        raise SettingsError(
            *(
                f"--tasks {name}: there is no local form of it for --data.{did_you_mean(name, BY_TASK)} "
                f"Local are {', '.join(BY_TASK)}; take others with --data hub"
                for name in without
            )
        )
    for name in names:
        if name in BY_TASK:
            _write(name, folder, local, num_fewshot)
    # lm-eval has some ten thousand files of its own; where ours cover every task, they need not be read.
    others = [name for name in names if name not in BY_TASK]
    manager = TaskManager(include_path=str(folder), include_defaults=bool(others))
    if unknown := [name for name in others if not manager.match_tasks([name])]:
        raise SettingsError(
            *(
                f"--tasks {name}: lm-eval has no such task.{did_you_mean(name, [*SUITES, *manager.all_tasks])} "
                "`lm_eval ls tasks` lists them"
                for name in unknown
            )
        )
    return manager


def _write(name: str, folder: Path, local: str | None, num_fewshot: int | None) -> None:
    """Write the task file of `name`; for MMLU one for each subject and one for the group."""
    benchmark = BY_TASK[name]
    file = OWN_TASKS / benchmark.task_files[name]
    shots = benchmark.shots
    if num_fewshot is not None and benchmark.shots:  # TruthfulQA is zero-shot by definition, as in lm-eval
        shots = num_fewshot
    if local is not None:
        read_splits(local, name)
    if name != "mmlu":
        _dump(folder / f"{name}.yaml", _task(name, file, shots, local, task=name))
        return
    known = sorted(path.stem.removeprefix("mmlu_") for path in file.parent.glob("mmlu_*.yaml"))
    present = known if local is None else subjects(local)
    for subject in present:
        own = file.parent / f"mmlu_{subject}.yaml"
        task = _task(f"mmlu_{subject}", own, shots, local, task=name, subject=subject)
        _dump(folder / f"mmlu_{subject}.yaml", task)
    group = {"task": [f"mmlu_{subject}" for subject in present], "num_fewshot": shots}
    _dump(folder / "mmlu.yaml", {"include": str(file), **group})


def _task(name: str, include: Path, shots: int, local: str | None, **rows: str) -> dict[str, Any]:
    """A task file's content; `rows` says which local rows `local_splits` reads."""
    content: dict[str, Any] = {"include": str(include), "task": name, "num_fewshot": shots}
    if local is not None:
        content["custom_dataset"] = _Function("preftree.evaluate.data.local_splits")
        content["dataset_kwargs"] = {"folder": str(Path(local).resolve()), **rows}
    return content


class _Function(str):
    """A function's full name, written with lm-eval's tag for functions."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False), encoding="utf-8")
