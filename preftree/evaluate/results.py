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
from preftree.errors import RunError

_HEADLINES = ("acc_norm", "acc", "exact_match", "f1")  # of a task outside the table, the first that it has


@dataclass(frozen=True, eq=False)
class Scores:
    """A task's (or group's) scores: one a question, in the order of `ids`; their mean is the task's score.

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
    """One evaluation: where it is, lm-eval's results file, and scores by task."""

    name: str
    folder: Path
    results: Mapping[str, Any]
    scores: dict[str, Scores]
    samples: dict[str, list[dict[str, Any]]]


def find_results(folder: str) -> Run:
    """The evaluation in a folder.

    Raises:
        RunError: there is none, or several, or its samples are missing.
    """
    place = Path(folder)
    files = sorted(place.glob("**/results_*.json")) if place.is_dir() else []
    if not files:
        raise RunError(
            f"{folder}: no evaluation here (results_*.json of lm-eval); preftree evaluate --out {folder} makes one"
        )
    if len(files) > 1:
        raise RunError(
            f"{folder} holds {len(files)} evaluations ({', '.join(file.name for file in files[:3])}, …); give the "
            "folder of one, or move the others away"
        )
    results = json.loads(files[0].read_text(encoding="utf-8"))
    stamp = files[0].stem.removeprefix("results_")
    samples = {}
    for task in results.get("configs", {}):
        path = files[0].with_name(f"samples_{task}_{stamp}.jsonl")
        if not path.is_file():
            raise RunError(
                f"{folder}: {path.name} is missing; without it nothing is known of single questions (--log_samples)"
            )
        samples[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Run(_name(results, place), place, results, _all_scores(results, samples), samples)


def _name(results: Mapping[str, Any], place: Path) -> str:
    arguments = results.get("config", {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    name = arguments.get("peft") or arguments.get("pretrained")
    return str(name) if name else place.name


def _all_scores(results: Mapping[str, Any], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Scores]:
    """Scores of groups (their tasks together) and of tasks that are in no group, the table's columns first."""
    groups = {name: children for name, children in (results.get("group_subtasks") or {}).items() if children}
    inner = {child for children in groups.values() for child in children}
    found = {}
    for name in [benchmark.task for benchmark in BENCHMARKS] + sorted((set(samples) | set(groups)) - inner):
        tasks = _leaves(name, groups) if name in groups else [name] if name in samples else []
        tasks = [task for task in tasks if task in samples]
        if tasks and name not in found:
            found[name] = _scores(name, tasks, samples)
    return found


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [leaf for child in groups[name] for leaf in (_leaves(child, groups) if child in groups else [child])]


def _scores(name: str, tasks: Sequence[str], samples: dict[str, list[dict[str, Any]]]) -> Scores:
    columns = {benchmark.task: (benchmark.metric, benchmark.heading) for benchmark in BENCHMARKS}
    rows = [(task, row) for task in tasks for row in sorted(samples[task], key=lambda row: int(row["doc_id"]))]
    known = rows[0][1].get("metrics") or []
    metric, heading = columns.get(name) or (
        next((m for m in _HEADLINES if m in known), known[0] if known else ""),
        name,
    )
    rows = [(task, row) for task, row in rows if row.get("filter") == rows[0][1].get("filter")]
    return Scores(
        task=name,
        metric=metric,
        heading=heading,
        ids=tuple((task, int(row["doc_id"])) for task, row in rows),
        value_Q=np.array([float(row[metric]) for _, row in rows]),
        prompts=tuple(f"{row['doc_hash']} {row['prompt_hash']} {row['target_hash']}" for _, row in rows),
    )


def average(run: Run) -> tuple[float, float]:
    """The mean of a run's scores and its standard error (questions of different tasks are independent)."""
    listed = list(run.scores.values())
    error = float(np.sqrt(sum(s.stderr**2 for s in listed))) / len(listed)
    return sum(s.mean for s in listed) / len(listed), error


def leaderboard(run: Run) -> Table:
    """One run as the leaderboard's row: average and columns, in percent, with standard errors."""
    table = Table(title=Text(run.name), title_justify="left")
    listed = list(run.scores.values())
    columns = [(f"{s.heading}\n{s.metric}, {len(s.ids)} questions", s.mean, s.stderr) for s in listed]
    if len(listed) > 1:
        columns.insert(0, ("Average", *average(run)))
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    table.add_row(*(f"{100 * mean:.2f} ± {100 * stderr:.2f}" for _, mean, stderr in columns))
    return table
