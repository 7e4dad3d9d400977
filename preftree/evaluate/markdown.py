"""Comparisons as Markdown: the table, differences with intervals, the first questions that flipped, held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from preftree.evaluate.results import Run, Scores, average
from preftree.evaluate.statistics import Difference
from preftree.io.markdown import cell

if TYPE_CHECKING:
    from preftree.evaluate.compare import Comparison

#: Flipped questions shown per task, of each kind.
SHOWN = 5


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Everything that `preftree compare` shows."""
    base = comparisons[0].base
    lines = _scores_table(comparisons)
    for c in comparisons:
        lines += ["", f"## {cell(c.other.name)} minus {cell(base.name)}", ""]
        rows = [("Average", c.average)] if c.average else []
        rows += [(base.scores[name].heading, c.tasks[name]) for name in base.scores]  # type: ignore[misc]
        lines += _differences_table("task", [_row(heading, d, 100, 2) for heading, d in rows if d is not None])
        lines += _power(rows)
        lines += _flips(c)
        lines += _heldout(c)
    lines += ["", "Intervals are of the difference question by question (paired); one that holds 0 means that these"]
    lines += ["questions do not tell the two apart."]
    return "\n".join(lines) + "\n"


def _scores_table(comparisons: Sequence[Comparison]) -> list[str]:
    """The base's row, then each other run's with its differences; the average where there are several tasks first."""
    base = comparisons[0].base
    names, several = list(base.scores), len(base.scores) > 1
    headings = ["Average"] * several + [cell(s.heading) for s in base.scores.values()]
    lines = [f"| Model | {' | '.join(headings)} |", "| --- |" + " ---: |" * len(headings)]

    def add(r: Run) -> None:
        cells = [_score(r.scores[name].mean, r.scores[name].stderr) for name in names]
        lines.append(f"| {cell(r.name)} | {' | '.join([_score(*average(r))] * several + cells)} |")

    add(base)
    for c in comparisons:
        add(c.other)
        differences = [c.average] * several + [c.tasks[name] for name in names]
        lines.append(f"| difference | {' | '.join(_interval(d, 100, 2) for d in differences if d is not None)} |")
    described = ", ".join(_described(s) for s in base.scores.values())
    lines += ["", f"Percent ± standard error over questions, differences with 95 % intervals: {described}."]
    return lines + [line for c in comparisons if c.other.seeds for line in _seeds(c.other)]


def _seeds(run: Run) -> list[str]:
    """What is averaged where runs are of several seeds, and how far these are apart."""
    found = [average(each)[0] for each in run.seeds]
    spread = f" (standard deviation {100 * np.std(found, ddof=1):.2f})" if len(found) > 1 else ""
    listed = ", ".join(f"{100 * value:.2f}" for value in found)
    return [
        "",
        f"{cell(run.name)}, averages by seed: {listed}{spread}. A question's score is its mean over "
        "the seeds; the question is the unit of every interval and test, so they are about these trained models.",
    ]


def _described(scores: Scores) -> str:
    return f"{cell(scores.heading)} {cell(scores.metric)} on {len(scores.ids)}"


def _score(mean: float, stderr: float) -> str:
    return f"{100 * mean:.2f} ± {100 * stderr:.2f}"


def _differences_table(first: str, rows: Sequence[str]) -> list[str]:
    return [
        f"| {first} | difference | 95 % interval | p | test | gained | lost |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
        *rows,
    ]


def _row(heading: str, d: Difference, scale: float, digits: int) -> str:
    flips = f"{d.gained} | {d.lost}" if d.gained is not None else " | "
    mean, low, high = _bounds(d, scale, digits)
    p = f"{d.p:.3f}" if d.p >= 0.001 else f"{d.p:.0e}"
    return f"| {cell(heading)} | {mean} | {low} … {high} | {p} | {d.test} | {flips} |"


def _interval(d: Difference, scale: float, digits: int) -> str:
    mean, low, high = _bounds(d, scale, digits)
    return f"**{mean}** ({low} … {high})"


def _bounds(d: Difference, scale: float, digits: int) -> tuple[str, ...]:
    return tuple(f"{scale * value:+.{digits}f}" for value in (d.mean, d.low, d.high))


def _power(rows: Sequence[tuple[str, Difference | None]]) -> list[str]:
    """The smallest differences that the questions could have shown."""
    known = [(heading, d.detectable) for heading, d in rows if d is not None and d.detectable is not None]
    if not known:
        return []
    listed = ", ".join(f"{cell(heading)} {100 * value:.2f}" for heading, value in known)
    return ["", f"Smallest true difference that a test at 5 % finds with 80 % probability, in points: {listed}."]


def _flips(c: Comparison) -> list[str]:
    """The first few questions that flipped, with their wording."""
    lines: list[str] = []
    for name, d in c.tasks.items():
        if not (d.gained or d.lost):
            continue
        change_Q = c.other.scores[name].value_Q - c.base.scores[name].value_Q
        for word, sign in (("gained", 1), ("lost", -1)):
            places = np.flatnonzero(change_Q * sign > 0)
            if len(places):
                shown = "; ".join(_question(c.base, name, int(q)) for q in places[:SHOWN])
                more = " …" if len(places) > SHOWN else ""
                lines += ["", f"{cell(c.base.scores[name].heading)}, {word}: {shown}{more}"]
    return lines


def _question(run: Run, name: str, index: int) -> str:
    """A question's task and number, and the beginning of its text."""
    task, number = run.scores[name].ids[index]
    row = next(row for row in run.samples[task] if int(row["doc_id"]) == number)
    doc = row.get("doc")
    texts = [str(doc[key]) for key in ("question", "query", "input") if key in doc] if isinstance(doc, dict) else []
    return cell(f"{task} {number}") + (f" ({cell(texts[0], 60)})" if texts else "")


def _heldout(c: Comparison) -> list[str]:
    """The held-out pairs of two runs, or why they are not compared."""
    ours, theirs = c.base.heldout, c.other.heldout
    if ours is None and theirs is None:
        return []
    if c.heldout is None or ours is None or theirs is None:
        scored = c.base if ours is not None else c.other
        return ["", f"Held-out pairs were scored for {cell(scored.name)} only, so they are not compared."]
    lines = ["", f"| {len(ours.keys)} held-out pairs | chosen more probable | margin, nats |", "| --- | ---: | ---: |"]
    for r, pairs in ((c.base, ours), (c.other, theirs)):
        margin = f"{pairs.margin_P.mean():+.2f} ± {_stderr(pairs.margin_P):.2f}"
        lines.append(f"| {cell(r.name)} | {_score(pairs.right_P.mean(), _stderr(pairs.right_P))} | {margin} |")
    rows = [_row("chosen more probable, percent", c.heldout.accuracy, 100, 2)]
    rows.append(_row("margin, nats", c.heldout.margin, 1, 2))
    return [*lines, "", *_differences_table("held-out pairs", rows)]


def _stderr(value_P: np.ndarray) -> float:
    return float(value_P.std(ddof=1) / np.sqrt(len(value_P))) if len(value_P) > 1 else float("nan")
