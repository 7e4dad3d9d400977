"""The report as Markdown: findings, numbers, scores and a few answers, for model cards and pull requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preftree.health.findings import verdict
from preftree.io.markdown import cell
from preftree.report import content
from preftree.report.read import RunView
from preftree.report.repeat import train_command

#: Answers that are shown per run.
_ANSWERS = 5


def markdown_report(runs: Sequence[RunView], scores: Mapping[str, Any] | None, title: str | None) -> str:
    """The report of some runs."""
    lines = [f"# {cell(title or ', '.join(run.name for run in runs))}"]
    for run in runs:
        lines += ["", f"**{cell(run.name)}**: {cell(verdict(run.diagnoses), 2000)}"]
        if run.diagnoses:
            lines += ["", "| finding | number | what usually helps |", "| --- | --- | --- |"]
            lines += [f"| {cell(d.title)} | {cell(d.number, 400)} | {cell(d.remedy, 600)} |" for d in run.diagnoses]
    overview = content.overview(runs)
    if overview:
        lines += ["", "| | " + " | ".join(cell(run.name) for run in runs) + " |", "| --- |" + " ---: |" * len(runs)]
        lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in overview]
    lines += _scores(scores, runs) if scores else []
    for run in runs:
        lines += _answers(run)
        lines += ["", "```sh", train_command(run.settings).replace("```", ""), "```"]
    return "\n".join(lines) + "\n"


def _scores(scores: Mapping[str, Any], runs: Sequence[RunView]) -> list[str]:
    names = list(scores["models"][0]["tasks"])
    heads = ["average", *names] if len(names) > 1 else names
    lines = ["", "| model | " + " | ".join(map(cell, heads)) + " |", "| --- |" + " ---: |" * len(heads)]
    for model in scores["models"]:
        values = [(task["score"], task["stderr"]) for task in model["tasks"].values()]
        if len(names) > 1:
            values.insert(0, (model["average"], model["average_stderr"]))
        shown = " | ".join(f"{100 * mean:.2f} ± {100 * error:.2f}" for mean, error in values)
        lines.append(f"| {cell(content.run_name(model['name'], runs))} | {shown} |")
    return lines


def _answers(run: RunView) -> list[str]:
    shown = content.answers(run)[:_ANSWERS]
    if not shown:
        return []
    lines = ["", "| prompt | before | after |", "| --- | --- | --- |"]
    for each in (row.answers for row in shown):
        lines.append("| " + " | ".join(cell(text) for text in (each.prompt, each.before, each.after)) + " |")
    return lines
