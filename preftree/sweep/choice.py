"""What a sweep found: the table of its runs, and which of them is chosen and why, for readers and for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from preftree.io.atomic import atomic_file, write_json
from preftree.io.markdown import cell
from preftree.report.read import RunView
from preftree.sweep.grid import SweptRun

#: Key in sweep.json, heading, value of a run (NaN where it has none), format.
_COLUMNS: tuple[tuple[str, str, Callable[[RunView], float], str], ...] = (
    ("accuracy", "held-out accuracy", lambda run: run.evidence.last_evaluation("eval_rewards/accuracies"), ".3f"),
    ("length_controlled_accuracy", "length-controlled",
     lambda run: _or_nan(run.margins("eval").length_controlled_accuracy), ".3f"),
    ("loss", "held-out loss", lambda run: run.evidence.last_evaluation("eval_loss"), ".4f"),
    ("margin", "held-out margin", lambda run: run.evidence.last_evaluation("eval_rewards/margins"), "+.3f"),
)  # fmt: skip
#: The columns by which a best run is named: losses and margins under different settings cannot be compared.
_BEST = ("accuracy", "length_controlled_accuracy")


@dataclass(frozen=True)
class Choice:
    """The run that a sweep chooses, and why, in words."""

    name: str
    reason: str


def choose(runs: Sequence[RunView]) -> Choice | None:
    """The run with the highest held-out accuracy; of several with the same, the highest length-controlled one, then
    the first of the grid. None where no run has a held-out accuracy."""
    accuracy, controlled = (_read(key) for key in _BEST)
    known = [run for run in runs if not math.isnan(accuracy(run))]
    if not known:
        return None
    best = max(known, key=lambda run: (accuracy(run), _rank(controlled(run))))
    reason = f"held-out accuracy {accuracy(best):.3f}, the highest of {len(known)}"
    equal = [run for run in known if run is not best and accuracy(run) == accuracy(best)]
    later = [run.name for run in equal if _rank(controlled(run)) == _rank(controlled(best))]
    if lower := [run.name for run in equal if run.name not in later]:
        reason += f"; tied with {', '.join(lower)}, and first by length-controlled accuracy, {controlled(best):.3f}"
    if later:
        reason += f"; tied in both accuracies with {', '.join(later)}, later in the grid"
    return Choice(best.name, reason)


def write_choice(output: Path, swept: Sequence[SweptRun], runs: Sequence[RunView], choice: Choice | None) -> None:
    """Write `sweep.json`, all runs with their flags and measures, and `best.yaml`, the chosen run's flags, which
    `preftree train` reads."""
    rows = [
        {"name": run.name, "folder": str(each.folder), "flags": each.flags, "held_out": _measures(run)}
        for each, run in zip(swept, runs, strict=True)
    ]
    chosen = None if choice is None else {"name": choice.name, "reason": choice.reason}
    write_json(output / "sweep.json", {"pairs": _pairs(runs), "chosen": chosen, "runs": rows})
    if choice is not None:
        flags = next(each.flags for each in swept if each.name == choice.name)
        with atomic_file(output / "best.yaml", "w") as file:
            file.write(f"# {choice.name}: {choice.reason}.\n" + yaml.safe_dump(flags, sort_keys=False))


def table(runs: Sequence[RunView]) -> str:
    """The runs as Markdown, with the best by held-out accuracy and by length-controlled accuracy."""
    ordered = sorted(runs, key=lambda run: _rank(_read("accuracy")(run)), reverse=True)
    headings = [heading for _, heading, _, _ in _COLUMNS]
    lines = [f"| run | {' | '.join(headings)} | warnings |", "| --- |" + " ---: |" * len(headings) + " --- |"]
    for run in ordered:
        values = [f"{value:{form}}" if not math.isnan(value := read(run)) else "" for _, _, read, form in _COLUMNS]
        warnings = ", ".join(found.key for found in run.diagnoses if found.level == "warning")
        lines.append(f"| {cell(run.name)} | {' | '.join(values)} | {warnings} |")
    lines += [
        "",
        f"On {_pairs(runs)} held-out pairs; an accuracy has a standard error of up to {_error(_pairs(runs)):.3f}.",
    ]
    for key, heading, read, form in _COLUMNS:
        known = [run for run in runs if not math.isnan(read(run))]
        if key in _BEST and known:
            best = max(known, key=read)
            lines.append(f"Best by {heading}: **{cell(best.name)}** ({read(best):{form}}).")
    return "\n".join(lines) + "\n"


def _read(wanted: str) -> Callable[[RunView], float]:
    return next(read for key, _, read, _ in _COLUMNS if key == wanted)


def _measures(run: RunView) -> dict[str, float | None]:
    values = {key: read(run) for key, _, read, _ in _COLUMNS}
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _pairs(runs: Sequence[RunView]) -> int:
    return max(run.evidence.evaluated_pairs for run in runs)


def _rank(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _error(pairs: int) -> float:
    return 0.5 / math.sqrt(pairs) if pairs else math.nan
