"""Which tasks to run, with how many shots, on which rows: lm-eval task files that include lm-eval's own.

The table of the leaderboard is four tasks with fixed shots. lm-eval's files leave the shots open and download the
rows; the files written here set the one and replace the other, nothing else. lm-eval reads them as it reads
`--include_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager

from preftree.errors import SettingsError, did_you_mean
from preftree.evaluate.data import SOURCES, read_source, subjects

OWN_TASKS = Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A column of the leaderboard: lm-eval's task (or group), its file, the shots, the metric, the heading."""

    file: str
    shots: int
    metric: str
    heading: str


#: The table of Open LLM Leaderboard's first version, which the original's results are given in.
BENCHMARKS: dict[str, Benchmark] = {
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", 25, "acc_norm", "ARC"),
    "hellaswag": Benchmark("hellaswag/hellaswag.yaml", 10, "acc_norm", "HellaSwag"),
    "mmlu": Benchmark("mmlu/default/_mmlu.yaml", 5, "acc", "MMLU"),
    "truthfulqa_mc2": Benchmark("truthfulqa/truthfulqa_mc2.yaml", 0, "acc", "TruthfulQA"),
}
_EXTRA_LOCAL = {"truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml"}
SUITES = {"openllm": tuple(BENCHMARKS)}


def expand(asked: str) -> list[str]:
    """Task names from `--tasks`: separated by commas, `openllm` for the leaderboard's four."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    found = list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))
    if not found:
        raise SettingsError("--tasks is empty; give openllm, or names of lm-eval's tasks separated by commas")
    return found


def plan_tasks(names: Sequence[str], folder: Path, data: str, num_fewshot: int | None = None) -> TaskManager:
    """lm-eval's task manager for `names`, their files written into `folder`.

    Args:
        data: "hub", or a folder of local files (see `data`).
        num_fewshot: shots of all tasks instead of the leaderboard's.

    Raises:
        SettingsError: tasks that are unknown, or that have no local form.
        DataError: local files that are missing or broken.
    """
    local = None if data == "hub" else data
    if local is not None and (without := [name for name in names if name not in SOURCES]):
        raise SettingsError(
            *(
                f"--tasks {name}: there is no local form of it for --data.{did_you_mean(name, SOURCES)} "
                f"Local are {', '.join(SOURCES)}; take others with --data hub"
                for name in without
            )
        )
    for name in names:
        if local is not None:
            read_source(local, name)
        _write(name, folder, local, num_fewshot)
    # lm-eval's own files are some ten thousand; where ours say it all, they need not be read.
    own = [name for name in names if name not in BENCHMARKS and name not in _EXTRA_LOCAL]
    manager = TaskManager(include_path=str(folder), include_defaults=bool(own))
    if unknown := [name for name in own if not manager.match_tasks([name])]:
        raise SettingsError(
            *(
                f"--tasks {name}: lm-eval has no such task.{did_you_mean(name, [*SUITES, *manager.all_tasks])} "
                "`lm_eval ls tasks` lists them"
                for name in unknown
            )
        )
    return manager


def _write(name: str, folder: Path, local: str | None, num_fewshot: int | None) -> None:
    if name in BENCHMARKS:
        file, shots = BENCHMARKS[name].file, BENCHMARKS[name].shots
    elif name in _EXTRA_LOCAL:
        file, shots = _EXTRA_LOCAL[name], 0
    else:
        return
    if num_fewshot is not None and not name.startswith("truthfulqa"):  # 0 by definition, as lm-eval has it
        shots = num_fewshot
    if name != "mmlu":
        _dump(folder / f"{name}.yaml", _task(name, OWN_TASKS / file, shots, local, name))
        return
    known = sorted(path.stem.removeprefix("mmlu_") for path in (OWN_TASKS / file).parent.glob("mmlu_*.yaml"))
    present = known if local is None else subjects(local)
    for subject in present:
        path = (OWN_TASKS / file).parent / f"mmlu_{subject}.yaml"
        task = _task(f"mmlu_{subject}", path, shots, local, "mmlu", subject=subject)
        _dump(folder / f"mmlu_{subject}.yaml", task)
    group = {"task": [f"mmlu_{subject}" for subject in present], "num_fewshot": shots}
    _dump(folder / "mmlu.yaml", {"include": str(OWN_TASKS / file), **group})


def _task(name: str, include: Path, shots: int, local: str | None, source: str, **more: str) -> dict[str, Any]:
    task: dict[str, Any] = {"include": str(include), "task": name, "num_fewshot": shots}
    if local is not None:
        task["custom_dataset"] = _Function("preftree.evaluate.data.local_splits")
        task["dataset_kwargs"] = {"folder": str(Path(local).resolve()), "source": source, **more}
    return task


class _Function(str):
    """A function's full name, written with lm-eval's tag for functions."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False), encoding="utf-8")
