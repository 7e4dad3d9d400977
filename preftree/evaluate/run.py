"""The evaluation stage: lm-eval's tasks through token trees, lm-eval's own results and samples into a folder."""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetNotFoundError
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from rich.console import Console

from preftree.config.evaluate import EvaluateSettings
from preftree.data.chat import refuse_broken_template
from preftree.data.hub import datasets_offline_if_unreachable
from preftree.data.sources import load_pairs
from preftree.errors import DataError, RunError
from preftree.evaluate.cache import RequestCache, model_key
from preftree.evaluate.harness import PreftreeLM
from preftree.evaluate.heldout import HeldOut, encode_heldout, score_heldout
from preftree.evaluate.quiet import quiet_libraries
from preftree.evaluate.results import find_results, leaderboard, results_files
from preftree.evaluate.save import remove_unfinished, save_results
from preftree.evaluate.tasks import expand, plan_tasks
from preftree.hardware.memory import peak_memory
from preftree.io.cache import cache_folder
from preftree.io.console import next_steps, sayer
from preftree.io.lock import folder_lock, removed_if_unused
from preftree.io.progress import Progress, amount, clock
from preftree.io.run_folder import make_folder


def run(asked: EvaluateSettings) -> None:
    """`preftree evaluate`: the tasks, then the held-out pairs if some are given.

    Raises:
        PreftreeError: anything about flags, data or model that the user can fix.
    """
    # The first process writes; the others would find its lock.
    if os.environ.get("RANK", "0") != "0":
        check_free(asked.out)
        _evaluate(asked)
        return
    folder, lock = Path(asked.out), ".lock"
    with removed_if_unused(folder, {lock}):
        check_free(asked.out)
        with folder_lock(folder / lock, folder):
            check_free(asked.out)  # again: another evaluation may have ended in between
            remove_unfinished(asked.out)
            _evaluate(asked)


def _evaluate(asked: EvaluateSettings) -> None:
    console, started = Console(soft_wrap=True), time.perf_counter()
    pairs = load_pairs(asked.preferences, limit=asked.limit) if asked.preferences else None
    with tempfile.TemporaryDirectory() as folder:
        manager = plan_tasks(expand(asked.tasks), Path(folder), asked.data, asked.num_fewshot)
        lm = _model(asked)
        heldout = None if pairs is None else encode_heldout(asked.preferences or "", pairs, lm, asked.truncate)
        _run_tasks(asked, lm, manager, console)
    if heldout is not None and lm.processes.is_main_process:
        _run_heldout(asked, lm, heldout, console)
    if lm.processes.is_main_process:
        seconds, memory = time.perf_counter() - started, peak_memory(str(lm.device))
        sayer(console)(f"done       in {clock(seconds)}, peak memory {amount(memory)}")
        next_steps(sayer(console), *_next_commands(asked))


def _next_commands(asked: EvaluateSettings) -> list[str]:
    """Compare with the base where an adapter was scored; else score an adapter to compare with."""
    out, base = shlex.quote(asked.out), shlex.quote(f"{asked.out}-base")
    same = f"--model {shlex.quote(asked.model)}" + (f" --tasks {asked.tasks}" if asked.tasks != "openllm" else "")
    same += f" --data {shlex.quote(asked.data)}" if asked.data != "hub" else ""
    same += f" --limit {asked.limit}" if asked.limit else ""
    same += f" --preferences {shlex.quote(asked.preferences)}" if asked.preferences else ""
    if asked.adapter:
        return [f"preftree evaluate {same} --out {base}", f"preftree compare {base} {out}"]
    return [f"preftree evaluate {same} --adapter RUN --out OTHER", f"preftree compare {out} OTHER"]


def check_free(out: str) -> None:
    """Refuse a folder that holds an evaluation: results of two runs side by side would be mistaken for one.

    The folder is made here, because hours later would be late to learn that it cannot be.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise RunError(f"--out {out} is a file. Give a folder.")
    if found := results_files(path):
        raise RunError(
            f"--out {out} holds an evaluation already ({found[-1].name}); nothing is overwritten. Give another folder."
        )
    make_folder("--out", out)


def _model(asked: EvaluateSettings) -> PreftreeLM:
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
    if asked.apply_chat_template:
        refuse_broken_template(lm.tokenizer)
    if asked.cache:
        lm.remember(RequestCache(cache_folder("answers") / model_key(lm.model, lm.settings), lm.say))
    return lm


def _run_tasks(asked: EvaluateSettings, lm: PreftreeLM, manager: Any, console: Console) -> None:
    """Run the tasks and write lm-eval's results and samples."""
    tracker = EvaluationTracker(output_path=asked.out)
    with quiet_libraries(Progress(lm.console, "contexts   ", "contexts")), _downloads():
        results: Any = simple_evaluate(
            lm,
            model_args={"pretrained": asked.model} | ({"peft": asked.adapter} if asked.adapter else {}),
            tasks=expand(asked.tasks),  # type: ignore[arg-type]
            batch_size=asked.batch_size,
            device=str(lm.device),
            limit=asked.limit,
            apply_chat_template=asked.apply_chat_template,
            fewshot_as_multiturn=asked.apply_chat_template,
            evaluation_tracker=tracker,
            task_manager=manager,
        )
        if results is None:  # not the first process
            return
        results["config"]["model"] = "preftree"
        save_results(asked.out, tracker, dict(results))
    console.print(leaderboard(find_results(asked.out)))
    sayer(console)(f"saved      {asked.out}: lm-eval's results and samples")


def _run_heldout(asked: EvaluateSettings, lm: PreftreeLM, heldout: HeldOut, console: Console) -> None:
    """Score the held-out pairs, write and show what they say."""

    def shrunk(budget: int) -> None:
        lm.say(f"note: out of memory; {budget} tokens per forward pass from here on")

    scored = score_heldout(heldout, lm.scorer, lm.forest_budget, Progress(lm.console, "pairs      ", "pairs"), shrunk)
    scored.write(asked.out)
    console.print(scored.table())


@contextmanager
def _downloads() -> Iterator[None]:
    """lm-eval downloads a task's rows while it evaluates; where it cannot, say what can be done about it."""
    try:
        with datasets_offline_if_unreachable():
            yield
    except (ConnectionError, DatasetNotFoundError) as problem:
        raise DataError(
            f"--data hub: the questions could not be downloaded from the hub: {problem}. Without a network give local "
            "files by --data DIR, which preftree evaluate --export-data DIR writes where there is one "
            "(docs/evaluation.md)"
        ) from problem
