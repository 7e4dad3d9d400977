"""`preftree compare BASE OTHER…`: the leaderboard's table, differences with intervals, questions that flipped."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from preftree.errors import RunError, SettingsError
from preftree.evaluate.markdown import markdown
from preftree.evaluate.results import Run, average, find_results
from preftree.evaluate.seeds import find_seeds, over_seeds
from preftree.evaluate.statistics import Difference, average_difference, paired_difference
from preftree.io.atomic import atomic_file, write_json
from preftree.io.console import next_steps
from preftree.io.run_folder import make_folder

#: Fields of a task's config that decide what is asked and what counts.
_TASK_FIELDS = (
    "description", "doc_to_choice", "doc_to_target", "doc_to_text", "fewshot_delimiter", "filter_list", "gen_prefix",
    "generation_kwargs", "metric_list", "num_fewshot", "output_type", "process_docs", "process_results", "repeats",
    "target_delimiter",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class HeldOutDifference:
    """Held-out pairs of two runs: how often the chosen answer is the more probable one, and the margin in nats."""

    accuracy: Difference
    margin: Difference


@dataclass(frozen=True, eq=False)
class Comparison:
    """One run beside the base: differences by task, of the average where there are several tasks, and of held-out
    pairs where both have them."""

    base: Run
    other: Run
    tasks: dict[str, Difference]
    average: Difference | None
    heldout: HeldOutDifference | None


def run(folders: Sequence[str], out: str | None, seeds: bool = False) -> list[Comparison]:
    """Compare, show, and write `compare.md` and `compare.json` into `out`; returns what was shown.

    Args:
        seeds: each folder after the first holds evaluations of one recipe, a folder per seed.

    Raises:
        RunError: no evaluation in a folder, settings that differ, or an `out` that cannot be used.
        SettingsError: fewer than two folders.
    """
    if len(folders) < 2:
        raise SettingsError("preftree compare needs two folders at least: the base's evaluation, then others")
    targets = [Path(out) / name for name in ("compare.md", "compare.json")] if out else []
    if out and Path(out).exists() and not Path(out).is_dir():
        raise RunError(f"--out {out} is a file. Give a folder.")
    if taken := [str(path) for path in targets if path.exists()]:
        raise RunError(f"--out: {', '.join(taken)} exists and is not overwritten; give another folder")
    comparisons = _comparisons(folders, seeds)
    text = markdown(comparisons)
    Console().print(Markdown(text))
    if out:
        make_folder("--out", out)
        try:
            with atomic_file(targets[0], "w") as file:
                file.write(text)
            write_json(targets[1], as_json(comparisons))
        except OSError as problem:
            raise RunError(f"--out {out} cannot be written to: {problem.strerror}. Give another folder.") from problem
        print(f"saved      {out}: compare.md, compare.json")
    adapters = [_adapter_of(each) for c in comparisons for each in c.other.seeds or (c.other,)]
    next_steps(print, *(command for each in adapters if each for command in _commands_for(each)))
    return comparisons


def _comparisons(folders: Sequence[str], seeds: bool) -> list[Comparison]:
    """The first folder's evaluation compared with those of the others. Raises RunError as `run` does."""
    base = find_results(folders[0])
    if not seeds:
        return [compare(base, find_results(folder)) for folder in folders[1:]]
    recipes = [find_seeds(folder) for folder in folders[1:]]
    for each in (each for recipe in recipes for each in recipe):
        _refuse_different(base, each)
    return [compare(base, over_seeds(recipe)) for recipe in recipes]


def _adapter_of(run: Run) -> str | None:
    """The folder of the adapter that was evaluated, None for a whole model."""
    given = run.results.get("config", {}).get("model_args")
    return str(given["peft"]) if isinstance(given, Mapping) and given.get("peft") else None


def _commands_for(adapter: str) -> list[str]:
    place = shlex.quote(adapter)
    return [f"preftree samples {place}", f"preftree merge {place} --out {shlex.quote(f'{adapter}-merged')}"]


def compare(base: Run, other: Run) -> Comparison:
    """The differences between two runs.

    Raises:
        RunError: they did not ask the same questions in the same way; everything that differs is named.
    """
    _refuse_different(base, other)
    repeats = max(1, len(other.seeds))
    pairs = {name: (base.scores[name].value_Q, other.scores[name].value_Q) for name in base.scores}
    tasks = {name: paired_difference(*values, repeats) for name, values in pairs.items()}
    heldout = None
    if base.heldout is not None and other.heldout is not None:
        heldout = HeldOutDifference(
            paired_difference(base.heldout.right_P, other.heldout.right_P, repeats),
            paired_difference(base.heldout.margin_P, other.heldout.margin_P, repeats),
        )
    return Comparison(base, other, tasks, average_difference([*pairs.values()]) if len(pairs) > 1 else None, heldout)


def _refuse_different(base: Run, other: Run) -> None:
    if problems := differing_settings(base, other):
        raise RunError(
            f"{base.folder} and {other.folder} cannot be compared, their settings differ:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def differing_settings(base: Run, other: Run) -> list[str]:
    """Settings in which two runs differ, other than the model itself; empty if they can be compared."""
    found = []

    def check(what: str, a: Any, b: Any) -> None:
        if a != b:
            found.append(f"{what}: {_short(a)} and {_short(b)}")

    a, b = base.results, other.results
    check("tasks", sorted(a["configs"]), sorted(b["configs"]))
    for name in ("limit", "model_dtype", "fewshot_seed", "gen_kwargs"):
        check(name, a["config"].get(name), b["config"].get(name))
    for name in ("chat_template_sha", "fewshot_as_multiturn", "system_instruction_sha", "max_length"):
        check(name, a.get(name), b.get(name))
    check("lm_eval version", a.get("lm_eval_version"), b.get("lm_eval_version"))
    for task in sorted(set(a["configs"]) & set(b["configs"])):
        check(f"{task}, version", a["versions"].get(task), b["versions"].get(task))
        for field in _TASK_FIELDS:
            check(f"{task}, {field}", a["configs"][task].get(field), b["configs"][task].get(field))
    check("scores", sorted(base.scores), sorted(other.scores))
    return found + _differing_questions(base, other)


def _differing_questions(base: Run, other: Run) -> list[str]:
    """Questions and held-out pairs that only one of two runs was asked, or that were asked in other words."""
    found = []
    for name in sorted(base.scores.keys() & other.scores.keys()):
        ours, theirs = base.scores[name], other.scores[name]
        if ours.metric != theirs.metric:
            found.append(f"{name}, metric: {_short(ours.metric)} and {_short(theirs.metric)}")
        if ours.ids != theirs.ids:
            found.append(f"{name}, questions: {len(ours.ids)} and {len(theirs.ids)}, not all the same")
        elif (changed := sum(x != y for x, y in zip(ours.prompts, theirs.prompts, strict=True))) > 0:
            found.append(f"{name}, contexts: {changed} of {len(ours.ids)} are worded differently (data or shots)")
    if base.heldout is not None and other.heldout is not None and base.heldout.keys != other.heldout.keys:
        counts = f"{len(base.heldout.keys)} and {len(other.heldout.keys)}"
        found.append(f"held-out pairs: {counts}, not all the same (--preferences)")
    return found


def _short(value: Any, room: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= room else text[: room - 1] + "…"


def as_json(comparisons: Sequence[Comparison]) -> Mapping[str, Any]:
    """Everything the Markdown says, and all flipped questions."""
    base = comparisons[0].base
    return {
        "models": [_run_json(r) for r in (base, *(c.other for c in comparisons))],
        "differences": [
            {
                "base": base.name,
                "other": c.other.name,
                "average": asdict(c.average) if c.average else None,
                "tasks": {name: asdict(d) for name, d in c.tasks.items()},
                "flipped": {name: _flipped_ids(c, name) for name, d in c.tasks.items() if d.gained is not None},
                "heldout": asdict(c.heldout) if c.heldout else None,
            }
            for c in comparisons
        ],
    }


def _run_json(r: Run) -> dict[str, Any]:
    tasks = {
        name: {"metric": s.metric, "score": s.mean, "stderr": s.stderr, "questions": len(s.ids)}
        for name, s in r.scores.items()
    }
    mean, stderr = average(r)
    found: dict[str, Any] = {
        "name": r.name,
        "folder": str(r.folder),
        "average": mean,
        "average_stderr": stderr,
        "tasks": tasks,
    }
    if r.heldout is not None:
        accuracy, margin = float(r.heldout.right_P.mean()), float(r.heldout.margin_P.mean())
        found["heldout"] = {"pairs": len(r.heldout.keys), "accuracy": accuracy, "margin": margin}
    if r.seeds:
        found["seeds"] = [_run_json(each) for each in r.seeds]
    return found


def _flipped_ids(c: Comparison, name: str) -> dict[str, list[str]]:
    change_Q = c.other.scores[name].value_Q - c.base.scores[name].value_Q
    ids = [f"{task} {number}" for task, number in c.base.scores[name].ids]
    return {word: [ids[q] for q in np.flatnonzero(change_Q * sign > 0)] for word, sign in (("gained", 1), ("lost", -1))}
