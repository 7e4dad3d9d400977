"""What a report shows of its runs, before it is HTML or Markdown: charts, tables and texts as plain data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftree.errors import RunError
from preftree.report.charts import Chart, Line, histogram_chart, line_chart
from preftree.report.read import ExamplePair, PromptAnswers, RunView
from preftree.text.differences import Piece, marked

#: Metrics that are no measurements with noise.
_EXACT = {"learning_rate", "peak_memory_gib"}
#: Title, metric, label of the y axis, logarithmic; each with the held-out metric beside it where there is one.
_CURVES: tuple[tuple[str, tuple[str, ...], str, bool], ...] = (
    ("Loss", ("loss", "eval_loss"), "", False),
    ("Accuracy", ("rewards/accuracies", "eval_rewards/accuracies"), "share of pairs", False),
    ("Margin", ("rewards/margins", "eval_rewards/margins"), "implicit reward", False),
    ("Rewards", ("rewards/chosen", "rewards/rejected"), "implicit reward", False),
    ("Log-probs", ("logps/chosen", "logps/rejected"), "nats", False),
    ("Learning rate", ("learning_rate",), "", False),
    ("Gradient norm", ("grad_norm",), "", True),
    ("Speed", ("pairs_per_second",), "pairs per second", False),
    ("MFU", ("mfu",), "share of peak", False),
    ("Peak memory", ("peak_memory_gib",), "GiB", False),
)
#: What a curve of two is called, by the start of its metric.
_WHAT = {"eval": "held out", "rewards/rejected": "rejected", "logps/rejected": "rejected"}
_WHAT |= {"rewards/chosen": "chosen", "logps/chosen": "chosen"}
#: Answers to fixed prompts that are shown of each run, those of them at once, and characters of each.
SHOWN_ANSWERS, FIRST_ANSWERS, EXCERPT_LENGTH = 16, 4, 1600


@dataclass(frozen=True)
class MarkedAnswers:
    """Answers before and after, in pieces of which the changed ones are marked."""

    answers: PromptAnswers
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]


def curves(runs: Sequence[RunView]) -> list[Chart]:
    """Every metric over steps, several runs in one chart."""
    charts = [line_chart(title, _lines(runs, metrics), unit, log) for title, metrics, unit, log in _CURVES]
    lengths = [
        Line(run.name, [step for step, _ in found], [tokens for _, tokens in found], index)
        for index, run in enumerate(runs)
        if len(found := run.answer_lengths()) > 1
    ]
    charts.insert(5, line_chart("Length of answers to the fixed prompts", lengths, "tokens"))
    return [chart for chart in charts if chart is not None]


def _lines(runs: Sequence[RunView], metrics: Sequence[str]) -> list[Line]:
    lines = []
    for index, run in enumerate(runs):
        for place, metric in enumerate(metrics):
            records = [r for r in (*run.records, *run.evaluations) if isinstance(r.get(metric), int | float)]
            what = next((word for start, word in _WHAT.items() if metric.startswith(start)), "training")
            one = len(metrics) == 1  # a curve of its own needs the run's name only
            label = run.name if one else what if len(runs) == 1 else f"{run.name}, {what}"
            x, y = [float(r["step"]) for r in records], [float(r[metric]) for r in records]
            lines.append(Line(label, x, y, index, dashed=place == 1, noisy=metric not in _EXACT))
    return lines


def data_charts(run: RunView) -> list[Chart]:
    """Lengths of what was trained on."""
    lengths = run.lengths.get("train")
    if lengths is None:
        return []
    both = list(zip(lengths.chosen, lengths.rejected, strict=True))
    charts = [
        histogram_chart("Answers", [("chosen", lengths.chosen, 0), ("rejected", lengths.rejected, 1)], "tokens"),
        histogram_chart("Chosen minus rejected", [("difference", [c - r for c, r in both], 0)], "tokens"),
        histogram_chart("Prompts", [("prompt", lengths.prompt, 2)], "tokens"),
    ]
    return [chart for chart in charts if chart is not None]


def pair_charts(run: RunView) -> list[Chart]:
    """Margins of single pairs."""
    series = [
        (label, run.margins(name).margin, color)
        for color, (name, label) in enumerate((("train", "training pairs"), ("eval", "held-out pairs")))
    ]
    charts = [histogram_chart("Margin of each pair, last seen", series, "implicit reward")]
    train = run.rewards.get("train", {})
    if any(first != last for first, last in train.values()):
        moved = [
            ("first seen", [first[0] - first[1] for first, _ in train.values()], 0),
            ("last seen", [last[0] - last[1] for _, last in train.values()], 1),
        ]
        charts.append(histogram_chart("Margin of training pairs, first and last seen", moved, "implicit reward"))
    return [chart for chart in charts if chart is not None]


def answers(run: RunView) -> list[MarkedAnswers]:
    """Answers to fixed prompts with their differences marked, changed ones first."""
    found = sorted(run.answers, key=lambda each: (each.before == each.after, each.how))
    return [MarkedAnswers(each, *marked(_cut(each.before), _cut(each.after))) for each in found[:SHOWN_ANSWERS]]


def _cut(text: str) -> str:
    return text if len(text) <= EXCERPT_LENGTH else text[:EXCERPT_LENGTH] + " …"


def examples(run: RunView) -> list[tuple[str, list[ExamplePair]]]:
    """The pairs with the smallest and the largest margins, held-out ones where there are some."""
    found = [each for each in run.examples if each.set == "eval"] or run.examples
    found = sorted(found, key=lambda each: each.margin)
    half = len(found) // 2
    return [("Smallest margins", found[:half]), ("Largest margins", found[half:][::-1])] if half else []


#: A row of the table of runs: heading, and how its value is read off a run.
_ROWS: tuple[tuple[str, Callable[[RunView], str]], ...] = (
    ("Steps", lambda run: f"{run.step}" + ("" if run.finished is not None else " so far")),
    ("Training pairs", lambda run: _whole(run.lengths["train"].pairs if "train" in run.lengths else math.nan)),
    ("Held-out pairs", lambda run: _whole(run.evidence.evaluated_pairs or math.nan)),
    ("Loss, last quarter", lambda run: _number(run.evidence.late("loss"), ".4f")),
    ("Accuracy, last quarter", lambda run: _number(run.evidence.late("rewards/accuracies"), ".3f")),
    ("Margin, last quarter", lambda run: _number(run.evidence.late("rewards/margins"), "+.3f")),
    ("Reward of chosen answers, last quarter", lambda run: _number(run.evidence.late("rewards/chosen"), "+.3f")),
    ("Held-out loss", lambda run: _number(run.evidence.last_evaluation("eval_loss"), ".4f")),
    ("Held-out accuracy", lambda run: _number(run.evidence.last_evaluation("eval_rewards/accuracies"), ".3f")),
    ("Held-out accuracy, length-controlled", lambda run: _number(_length_controlled(run), ".3f")),
    ("Held-out margin", lambda run: _number(run.evidence.last_evaluation("eval_rewards/margins"), "+.3f")),
    ("KL from the reference, drawn answers", lambda run: _mean(run.evidence.answers.log_ratios, "nats")),
    ("Tokens of answers before", lambda run: _mean(run.evidence.answers.before)),
    ("Tokens of answers after", lambda run: _mean(run.evidence.answers.after)),
    ("Fixed prompts that pass before", lambda run: _passed(run, 0)),
    ("Fixed prompts that pass after", lambda run: _passed(run, 1)),
    ("Pairs per second", lambda run: _mean(run.evidence.values("pairs_per_second"))),
    ("Prompt tokens saved", lambda run: _percent(run.evidence.late("tokens_saved"))),
    ("Peak memory", lambda run: _number(run.evidence.late("peak_memory_gib"), ".2f", " GiB")),
)


def overview(runs: Sequence[RunView]) -> list[list[str]]:
    """A row per quantity, a column per run; rows that no run knows are left out."""
    rows = [[heading, *(read(run) for run in runs)] for heading, read in _ROWS]
    return [row for row in rows if any(row[1:])]


def _length_controlled(run: RunView) -> float | None:
    return run.margins("eval").length_controlled_accuracy


def _whole(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}{unit}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.0f} %"


def _mean(values: Sequence[float], unit: str = "") -> str:
    return f"{sum(values) / len(values):.3g} {unit}".strip() if values else ""


def _passed(run: RunView, when: int) -> str:
    checked = [each.passed[when] for each in run.answers if each.passed is not None]
    return f"{sum(checked)} of {len(checked)}" if checked else ""


def scores(folder: str | None) -> Mapping[str, Any] | None:
    """The table of `preftree compare` in a folder. Raises RunError where there is none."""
    if folder is None:
        return None
    path = Path(folder) / "compare.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content["models"], list)
        assert isinstance(content["differences"], list)
        return _numbers_again(content)  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise RunError(
            f"--compare {folder}: no compare.json here; preftree compare … --out {folder} writes one."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as problem:
        raise RunError(f"{path} is damaged ({type(problem).__name__}). Run preftree compare again.") from problem


def run_name(model: str, runs: Sequence[RunView]) -> str:
    """What the page calls a model of the table: a run of this report by its name there, another as it was given."""
    return next((run.name for run in runs if os.path.abspath(model) == os.path.abspath(run.folder)), model)


def share_stderr(heldout: Mapping[str, Any]) -> float:
    """Standard error of the share of held-out pairs whose chosen answer is more probable."""
    share, pairs = float(heldout["accuracy"]), int(heldout["pairs"])
    return math.sqrt(share * (1 - share) / max(1, pairs - 1))


#: Fields of compare.json that hold a number, or the word for one that is not finite.
_NUMBERS = {"average", "average_stderr", "score", "stderr", "mean", "low", "high", "p", "accuracy", "margin"}


def _numbers_again(value: Any) -> Any:
    """JSON values with "nan" and "inf" as numbers where a number belongs."""
    if isinstance(value, list):
        return [_numbers_again(each) for each in value]
    if isinstance(value, dict):
        return {
            key: float(each) if key in _NUMBERS and isinstance(each, str) else _numbers_again(each)
            for key, each in value.items()
        }
    return value


def facts(run: RunView) -> list[tuple[str, str]]:
    """Machine, versions and fingerprints."""
    environment = run.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    devices = ", ".join(device["name"] for device in environment.get("devices", []))
    pairs = [
        ("Settings' fingerprint", run.fingerprint),
        *((str(name), _plain(value)) for name, value in run.identity.items() if not str(name).startswith("--")),
        ("Versions", versions),
        ("Python", str(environment.get("python", ""))),
        ("System", str(environment.get("system", ""))),
        ("Device", devices or str(environment.get("cpu", ""))),
        ("Commit", str(environment.get("commit") or "")),
    ]
    return [(name, value) for name, value in pairs if value]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_without_nothing(value), ensure_ascii=False)


def _without_nothing(value: Any) -> Any:
    """A configuration without the options that are off or empty, which are most of an adapter's."""
    if not isinstance(value, dict):
        return value
    kept = {key: _without_nothing(item) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item not in (None, False, "", [], {})}
