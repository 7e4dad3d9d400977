"""The evaluation stage: lm-eval's tasks through token trees, lm-eval's own results and samples into a folder."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from rich.console import Console

from preftree.data.encode import encode_pairs
from preftree.data.sources import load_pairs
from preftree.errors import DataError, RunError
from preftree.evaluate.cache import RequestCache, model_key
from preftree.evaluate.harness import PreftreeLM
from preftree.evaluate.preference import preference_table, report_pairs
from preftree.evaluate.results import find_results, leaderboard
from preftree.evaluate.tasks import expand, plan_tasks
from preftree.hardware.environment import environment
from preftree.io.atomic import write_json
from preftree.io.cache import cache_root
from preftree.io.progress import Progress
from preftree.io.run_folder import RunFolder, make_folder


@dataclass(frozen=True)
class Evaluation:
    """What `preftree evaluate` was asked for; the flags' help says what each is."""

    model: str
    out: str
    adapter: str | None = None
    tasks: str = "openllm"
    data: str = "hub"
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    dtype: str = "auto"
    device: str | None = None
    max_length: int | None = None
    truncate: bool = False
    tokens_per_forest: int | None = None
    batch_size: int = 1
    preferences: str | None = None
    cache: bool = True


def run(asked: Evaluation) -> None:
    """`preftree evaluate`: the tasks, then the held-out pairs if some are given."""
    console = Console(soft_wrap=True)
    check_free(asked.out)
    pairs = load_pairs(asked.preferences) if asked.preferences else None  # a file that is missing is told at once
    lm = evaluate(asked, console)
    if pairs is None:
        return
    encoded, _ = encode_pairs(
        pairs, lm.tokenizer, max_length=lm.max_length, max_prompt_length=max(1, lm.max_length // 2)
    )
    if lm.processes.is_main_process:
        report = report_pairs(lm.scorer, encoded, Progress(console, "pairs      ", "pairs"))
        write_json(Path(asked.out) / "preferences.json", {"file": asked.preferences, **asdict(report)})
        console.print(preference_table(report))


def evaluate(asked: Evaluation, console: Console) -> PreftreeLM:
    """Run the tasks and write lm-eval's results and samples; returns the model.

    Raises:
        PreftreeError: anything about flags, data or model that the user can mend.
    """
    names = expand(asked.tasks)
    with _quiet_libraries(), tempfile.TemporaryDirectory() as place:
        manager = plan_tasks(names, Path(place), asked.data, asked.num_fewshot)
        lm = _model(asked)
        tracker = EvaluationTracker(output_path=asked.out)
        with _fetching():
            results: Any = simple_evaluate(
                lm,
                model_args={"pretrained": asked.model} | ({"peft": asked.adapter} if asked.adapter else {}),
                tasks=list(names),
                batch_size=asked.batch_size,
                device=str(lm.device),
                limit=asked.limit,
                apply_chat_template=asked.apply_chat_template,
                fewshot_as_multiturn=asked.apply_chat_template,
                evaluation_tracker=tracker,
                task_manager=manager,
            )
        if results is None:  # not the first process
            return lm
        results["config"]["model"] = "preftree"
        _save(asked, tracker, dict(results))
    console.print(leaderboard(find_results(asked.out)))
    console.print(f"{asked.out}: lm-eval's results and samples; compare runs by `preftree compare`", markup=False)
    return lm


@contextmanager
def _fetching() -> Iterator[None]:
    """lm-eval fetches a task's rows while it evaluates; where it cannot, say what can be done about it."""
    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as problem:
        raise DataError(
            f"--data hub: the questions could not be downloaded from the hub: {problem}. Without a network give local "
            "files by --data DIR, which preftree evaluate --export-data DIR writes where there is one "
            "(docs/evaluation.md)"
        ) from problem


def check_free(out: str) -> None:
    """Refuse a folder that holds an evaluation: results of two runs side by side would be mistaken for one.

    The folder is made here, because hours later would be late to learn that it cannot be.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise RunError(f"--out {out} is a file. Give a folder.")
    if found := sorted(path.glob("**/results_*.json")) if path.is_dir() else []:
        raise RunError(
            f"--out {out} holds an evaluation already ({found[-1].name}); nothing is written over. Give another folder."
        )
    make_folder("--out", out)


def _model(asked: Evaluation) -> PreftreeLM:
    lm = PreftreeLM(
        asked.model,
        peft=asked.adapter,
        dtype=asked.dtype,
        device=asked.device,
        tokens_per_forest=asked.tokens_per_forest,
        batch_size=asked.batch_size,
        max_length=asked.max_length,
        on_truncation="warn" if asked.truncate else "refuse",
    )
    if asked.cache:
        lm.remember(RequestCache(cache_root() / "answers" / model_key(lm.model, lm.settings)))
    return lm


def _save(asked: Evaluation, tracker: EvaluationTracker, results: dict[str, Any]) -> None:
    """Samples first, then the results file: whoever finds that finds them all."""
    samples = results.pop("samples")
    RunFolder(asked.out).write_env(environment())
    # The tracker names samples by the time of its results, so these are written to a place of their own first.
    with tempfile.TemporaryDirectory(dir=asked.out) as half:
        tracker.output_path = half
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
        written = sorted(Path(half).rglob("*.json*"), key=lambda path: path.name.startswith("results_"))
        if not any(path.name.startswith("results_") for path in written):
            raise RunError(f"--out {asked.out}: lm-eval could not write its results there; is the disk full?")
        for path in written:
            target = Path(asked.out) / path.relative_to(half)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """lm-eval's log and datasets' bars say little that is for the user; errors still come through."""
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        datasets.enable_progress_bars()
