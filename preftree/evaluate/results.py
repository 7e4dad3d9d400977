"""Reading what lm-eval wrote: results, settings and per-question scores, and the leaderboard's table of them.

Any folder that `lm_eval --output_path … --log_samples` made can be read, whichever model class made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from preftree.benchmarks import BENCHMARKS
from preftree.errors import DataError, RunError
from preftree.evaluate.heldout import DETAILS, HeldOutScores, read_heldout
from preftree.io.console import visible

#: The metric of a task outside the table: the first of these that it has.
_HEADLINES = ("acc_norm", "acc", "exact_match", "f1")
#: What is used of each of lm-eval's samples besides its metrics.
_ROW = ("doc_id", "doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True, eq=False)
class Scores:
    """A task's (or group's) scores: one per question, in the order of `ids`; their mean is the task's score.

    Args:
        ids: (task, question) of each score.
        value_Q: the metric of each question.
        text: the question's prompt hash, so that two runs can be told to have asked the same.
    """

    task: str
    metric: str
    heading: str
    ids: tuple[tuple[str, int], ...]
    value_Q: np.ndarray
    prompts: tuple[str, ...]

    @property
    def mean(self) -> float:
        return float(self.value_Q.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the mean over questions, as lm-eval computes it."""
        count = len(self.value_Q)
        return float(self.value_Q.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")


@dataclass(frozen=True, eq=False)
class Run:
    """One evaluation: where it is, lm-eval's results file, scores by task, and held-out pairs if it had some.

    Args:
        seeds: the evaluations whose mean this is (`preftree.evaluate.seeds`), where it is one.
    """

    name: str
    folder: Path
    results: Mapping[str, Any]
    scores: dict[str, Scores]
    samples: dict[str, list[dict[str, Any]]]
    heldout: HeldOutScores | None = None
    seeds: tuple[Run, ...] = ()


def results_files(folder: Path) -> list[Path]:
    """The results files of lm-eval below a folder; what a kill left half written lies in hidden folders."""
    found = folder.glob("**/results_*.json") if folder.is_dir() else []
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def find_results(folder: str) -> Run:
    """The evaluation in a folder.

    Raises:
        RunError: there is none, or several; its samples are missing; a file is damaged.
    """
    place = Path(folder)
    files = results_files(place)
    if not files:
        raise RunError(
            f"{folder}: no evaluation here (results_*.json of lm-eval); preftree evaluate --out {folder} makes one"
        )
    if len(files) > 1:
        raise RunError(
            f"{folder} holds {len(files)} evaluations ({', '.join(file.name for file in files[:3])}, …); give the "
            "folder of one, or preftree compare --seeds where they are one recipe trained with several seeds"
        )
    results = _read_results(files[0])
    stamp = files[0].stem.removeprefix("results_")
    samples = {task: _read_samples(files[0].with_name(f"samples_{task}_{stamp}.jsonl")) for task in results["configs"]}
    try:
        heldout = read_heldout(place)
    except (DataError, KeyError, OSError, TypeError, ValueError) as problem:
        raise _damaged(place / DETAILS, f"{type(problem).__name__}: {problem}") from problem
    return Run(_name(results, place), place, results, _all_scores(results, samples), samples, heldout)


def _damaged(path: Path, words: str) -> RunError:
    return RunError(f"{path} is damaged: {words}. Run the evaluation again, into another folder.")


def _read_results(path: Path) -> dict[str, Any]:
    """lm-eval's results file, its parts that are used of the right form."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise _damaged(path, f"it is not JSON ({problem})") from problem
    if not isinstance(results, dict):
        raise _damaged(path, "it is not a JSON object")
    for name in ("configs", "config", "versions", "group_subtasks"):
        if not isinstance(results.setdefault(name, {}), dict):
            raise _damaged(path, f"{name} is not a JSON object")
    for task, config in results["configs"].items():
        if not isinstance(config, dict):
            raise _damaged(path, f"the config of {task} is not a JSON object")
    for group, tasks in results["group_subtasks"].items():
        if not isinstance(tasks, list):
            raise _damaged(path, f"the tasks of {group} are not a list")
    if not results["configs"]:
        raise _damaged(path, "it names no task")
    return results


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """A task's samples, one per question and filter."""
    if not path.is_file():
        raise RunError(
            f"{path.parent}: {path.name} is missing; without it nothing is known of single questions (--log_samples)"
        )
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                rows.append(json.loads(line))
    except (OSError, ValueError) as problem:
        raise _damaged(path, f"line {len(rows) + 1} is not JSON ({problem})") from problem
    if not rows:
        raise _damaged(path, "it holds no question")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise _damaged(path, f"line {number} is not a JSON object")
        if missing := [name for name in _ROW if name not in row]:
            raise _damaged(path, f"line {number} has no {', '.join(missing)}")
        if not str(row["doc_id"]).isdigit():
            raise _damaged(path, f"line {number}: doc_id is {row['doc_id']!r}")
    return rows


def _name(results: Mapping[str, Any], place: Path) -> str:
    arguments = results["config"].get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    if not isinstance(arguments, dict):
        return place.name
    return str(arguments.get("peft") or arguments.get("pretrained") or place.name)


def _all_scores(results: Mapping[str, Any], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Scores]:
    """Scores of groups (their tasks together) and of tasks that are in no group, the table's columns first."""
    groups = {name: children for name, children in results["group_subtasks"].items() if children}
    inner = {child for children in groups.values() for child in children}
    found: dict[str, Scores] = {}
    for name in [benchmark.task for benchmark in BENCHMARKS] + sorted((set(samples) | set(groups)) - inner):
        tasks = _leaves(name, groups) if name in groups else [name] if name in samples else []
        tasks = [task for task in tasks if task in samples]
        if tasks and name not in found:
            found[name] = _scores(name, tasks, samples)
    return found


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group, however groups are nested."""
    tasks, waiting, seen = [], list(groups[name]), {name}
    while waiting:
        child = waiting.pop(0)
        if child not in groups:
            tasks.append(child)
        elif child not in seen:
            seen.add(child)
            waiting = [*groups[child], *waiting]
    return tasks


def _scores(name: str, tasks: Sequence[str], samples: dict[str, list[dict[str, Any]]]) -> Scores:
    columns = {benchmark.task: (benchmark.metric, benchmark.heading) for benchmark in BENCHMARKS}
    rows = [(task, row) for task in tasks for row in sorted(samples[task], key=lambda row: int(row["doc_id"]))]
    known = rows[0][1].get("metrics")
    known = known if isinstance(known, list) else []
    metric, heading = columns.get(name) or (
        next((m for m in _HEADLINES if m in known), str(known[0]) if known else ""),
        name,
    )
    rows = [(task, row) for task, row in rows if row.get("filter") == rows[0][1].get("filter")]
    return Scores(
        task=name,
        metric=metric,
        heading=heading,
        ids=tuple((task, int(row["doc_id"])) for task, row in rows),
        value_Q=np.array([_value(task, row, metric) for task, row in rows]),
        prompts=tuple(f"{row['doc_hash']} {row['prompt_hash']} {row['target_hash']}" for _, row in rows),
    )


def _value(task: str, row: Mapping[str, Any], metric: str) -> float:
    value = row.get(metric)
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        raise RunError(
            f"{task}, question {row['doc_id']}: the samples hold no number for its metric {metric or '(none is named)'}"
            f", but {value!r}. Runs are compared by one number per question."
        )
    return float(value)


def average(run: Run) -> tuple[float, float]:
    """The mean of a run's scores and its standard error (questions of different tasks are independent)."""
    listed = list(run.scores.values())
    error = float(np.sqrt(sum(s.stderr**2 for s in listed))) / len(listed)
    return sum(s.mean for s in listed) / len(listed), error


def leaderboard(run: Run) -> Table:
    """One run as the leaderboard's row: average and columns, in percent, with standard errors."""
    table = Table(title=Text(visible(run.name)), title_justify="left")
    listed = list(run.scores.values())
    columns = [(visible(f"{s.heading}\n{s.metric}, {len(s.ids)} questions"), s.mean, s.stderr) for s in listed]
    if len(listed) > 1:
        columns.insert(0, ("Average", *average(run)))
    for heading, _, _ in columns:
        table.add_column(Text(heading), justify="right")
    table.add_row(*(f"{100 * mean:.2f} ± {100 * stderr:.2f}" for _, mean, stderr in columns))
    return table
