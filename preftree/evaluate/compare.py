"""`preftree compare BASE OTHER…`: the leaderboard's table, differences with intervals, questions that flipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from preftree.errors import RunError, SettingsError
from preftree.evaluate.results import Run, Scores, average, find_results
from preftree.evaluate.statistics import Difference, average_difference, paired_difference
from preftree.io.atomic import write_json

#: Fields of a task's config that decide what is asked and what counts.
_TASK_FIELDS = (
    "description", "doc_to_choice", "doc_to_target", "doc_to_text", "fewshot_delimiter", "filter_list", "gen_prefix",
    "generation_kwargs", "metric_list", "num_fewshot", "output_type", "process_docs", "process_results", "repeats",
    "target_delimiter",
)  # fmt: skip
#: Flipped questions shown of a task, of each kind.
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Comparison:
    """One run beside the base: differences by task, and of the average where there are several tasks."""

    base: Run
    other: Run
    tasks: dict[str, Difference]
    average: Difference | None


def run(folders: Sequence[str], out: str | None) -> None:
    """Compare, show, and write `compare.md` and `compare.json` into `out`.

    Raises:
        RunError: no evaluation in a folder, settings that differ, or an occupied `out`.
    """
    if len(folders) < 2:
        raise SettingsError("preftree compare needs two folders at least: the base's evaluation, then others")
    targets = [Path(out) / name for name in ("compare.md", "compare.json")] if out else []
    if taken := [str(path) for path in targets if path.exists()]:
        raise RunError(f"--out: {', '.join(taken)} exists and is not written over; give another folder")
    runs = [find_results(folder) for folder in folders]
    comparisons = [compare(runs[0], other) for other in runs[1:]]
    text = markdown(comparisons)
    Console().print(Markdown(text))
    if targets:
        Path(out or "").mkdir(parents=True, exist_ok=True)
        targets[0].write_text(text, encoding="utf-8")
        write_json(targets[1], as_json(comparisons))


def compare(base: Run, other: Run) -> Comparison:
    """The differences between two runs.

    Raises:
        RunError: they did not ask the same questions in the same way; everything that differs is named.
    """
    if problems := differing_settings(base, other):
        raise RunError(
            f"{base.folder} and {other.folder} cannot be compared, their settings differ:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    tasks = {name: paired_difference(base.scores[name].value_Q, other.scores[name].value_Q) for name in base.scores}
    pairs = [(base.scores[name].value_Q, other.scores[name].value_Q) for name in base.scores]
    return Comparison(base, other, tasks, average_difference(pairs) if len(pairs) > 1 else None)


def differing_settings(base: Run, other: Run) -> list[str]:
    """Settings in which two runs differ, other than the model itself; empty if they can be compared."""
    found = []

    def check(what: str, a: Any, b: Any) -> None:
        if a != b:
            found.append(f"{what}: {_short(a)} and {_short(b)}")

    a, b = base.results, other.results
    check("tasks", sorted(a.get("configs", {})), sorted(b.get("configs", {})))
    for name in ("limit", "model_dtype", "fewshot_seed", "gen_kwargs"):
        check(name, a.get("config", {}).get(name), b.get("config", {}).get(name))
    for name in ("chat_template_sha", "fewshot_as_multiturn", "system_instruction_sha", "max_length"):
        check(name, a.get(name), b.get(name))
    check("lm_eval version", a.get("lm_eval_version"), b.get("lm_eval_version"))
    for task in sorted(set(a.get("configs", {})) & set(b.get("configs", {}))):
        check(f"{task}, version", a.get("versions", {}).get(task), b.get("versions", {}).get(task))
        for field in _TASK_FIELDS:
            check(f"{task}, {field}", a["configs"][task].get(field), b["configs"][task].get(field))
    for name in base.scores.keys() & other.scores.keys():
        ours, theirs = base.scores[name], other.scores[name]
        if ours.ids != theirs.ids:
            found.append(f"{name}, questions: {len(ours.ids)} and {len(theirs.ids)}, not all the same")
        elif (changed := sum(x != y for x, y in zip(ours.prompts, theirs.prompts, strict=True))) > 0:
            found.append(f"{name}, contexts: {changed} of {len(ours.ids)} are worded differently (data or shots)")
    return found


def _short(value: Any, room: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= room else text[: room - 1] + "…"


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Table, differences and flips as Markdown."""
    base = comparisons[0].base
    runs = [base, *(c.other for c in comparisons)]
    names = list(base.scores)
    headings = [f"{s.heading}" for s in base.scores.values()]
    several = len(names) > 1
    lines = [f"| Model | {'Average | ' if several else ''}{' | '.join(headings)} |"]
    lines.append("| --- |" + " ---: |" * (len(names) + several))
    for r in runs:
        cells = [_score(r.scores[name].mean, r.scores[name].stderr) for name in names]
        lines.append(f"| {_cell(r.name)} | {' | '.join([_score(*average(r))] * several + cells)} |")
    lines += [
        "",
        "Percent ± standard error over questions: " + ", ".join(_described(s) for s in base.scores.values()) + ".",
    ]
    for c in comparisons:
        lines += ["", f"## {_cell(c.other.name)} minus {_cell(base.name)}", ""]
        lines += [
            "| task | difference | 95 % interval | p | test | gained | lost |",
            "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
        ]
        rows = [("Average", c.average)] if c.average else []
        rows += [(base.scores[name].heading, c.tasks[name]) for name in names]  # type: ignore[misc]
        lines += [_row(heading, d) for heading, d in rows if d is not None]
        lines += _flips(c)
    lines += ["", "Intervals are of the difference question by question (paired); one that holds 0 means that these"]
    lines += ["questions do not tell the two apart."]
    return "\n".join(lines) + "\n"


def _described(scores: Scores) -> str:
    return f"{scores.heading} {scores.metric} on {len(scores.ids)}"


def _score(mean: float, stderr: float) -> str:
    return f"{100 * mean:.2f} ± {100 * stderr:.2f}"


def _row(heading: str, d: Difference) -> str:
    flips = f"{d.gained} | {d.lost}" if d.gained is not None else " | "
    interval = f"{100 * d.low:+.2f} … {100 * d.high:+.2f}"
    return f"| {heading} | {100 * d.mean:+.2f} | {interval} | {d.p:.3f} | {d.test} | {flips} |"


def _flips(c: Comparison) -> list[str]:
    """The first few questions that flipped, with their wording."""
    lines: list[str] = []
    for name, d in c.tasks.items():
        if not (d.gained or d.lost):
            continue
        change_Q = c.other.scores[name].value_Q - c.base.scores[name].value_Q
        for word, sign in (("gained", 1), ("lost", -1)):
            places = np.flatnonzero(change_Q == sign)[:SHOWN]
            if len(places):
                shown = "; ".join(f"{_place(c.base, name, int(q))}" for q in places)
                lines += [
                    "",
                    f"{c.base.scores[name].heading}, {word}: {shown}"
                    + (" …" if (change_Q == sign).sum() > SHOWN else ""),
                ]
    return lines


def _place(run_: Run, name: str, question: int) -> str:
    task, number = run_.scores[name].ids[question]
    row = next(row for row in run_.samples[task] if int(row["doc_id"]) == number)
    words = next((str(row["doc"][key]) for key in ("question", "query", "input") if key in row.get("doc", {})), "")
    return f"{task} {number} ({_cell(words, 60)})" if words else f"{task} {number}"


def _cell(text: str, room: int = 200) -> str:
    """Foreign text in a Markdown table: one line, no markup, no bars."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= room else flat[: room - 1] + "…"
    return "".join(f"\\{c}" if c in "|\\`*_[]<>#" else c for c in flat)


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
    return {"name": r.name, "folder": str(r.folder), "average": mean, "average_stderr": stderr, "tasks": tasks}


def _flipped_ids(c: Comparison, name: str) -> dict[str, list[str]]:
    change_Q = c.other.scores[name].value_Q - c.base.scores[name].value_Q
    ids = [f"{task} {number}" for task, number in c.base.scores[name].ids]
    return {word: [ids[q] for q in np.flatnonzero(change_Q == sign)] for word, sign in (("gained", 1), ("lost", -1))}
