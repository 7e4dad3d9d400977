"""`preftree demo --average RUN…`: demos of several seeds as one result, with a paired test over the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from preftree.demo.rows import SPLITS, read_split
from preftree.errors import DataError, RunError
from preftree.evaluate.statistics import Difference, paired_difference
from preftree.io.console import sayer
from preftree.io.run_folder import RunFolder


@dataclass(frozen=True)
class DemoAverage:
    """Held-out prompts that passed their check.

    Args:
        before, after: how many, of each run.
        prompts: how many there are.
        difference: of the shares, after minus before, prompt by prompt; a prompt's share is its mean over the runs.
    """

    before: list[int]
    after: list[int]
    prompts: int
    difference: Difference


def show_average(folders: Sequence[str], console: Console) -> None:
    """Print the average of demos that are done.

    Raises:
        RunError: a folder holds no whole demo, or one of other prompts.
    """
    found, say = demo_average(folders), sayer(console)
    d = found.difference
    for when, counts in (("before", found.before), ("after", found.after)):
        mean = np.mean(counts)
        say(f"{when:10} {mean:.1f} of {found.prompts} held-out prompts pass, {100 * mean / found.prompts:.1f} % "
            f"(by run: {', '.join(map(str, counts))})")  # fmt: skip
    say(f"difference {100 * d.mean:+.1f} points, 95 % interval {100 * d.low:+.1f} … {100 * d.high:+.1f}")
    say(f"test       p {d.p:.2g} ({d.test}): {d.gained} prompts pass more often than before, {d.lost} less often")
    say("           a prompt's result is its mean over the runs; the prompt is the unit of interval and test")


def demo_average(folders: Sequence[str]) -> DemoAverage:
    """The average of demos, from what they wrote into their run folders. Raises RunError as `show_average` does."""
    questions = [row["question"] for row in read_split(SPLITS[1])]
    before_RQ, after_RQ = (
        np.array(values, float) for values in zip(*(_verdicts(f, questions) for f in folders), strict=True)
    )
    difference = paired_difference(before_RQ.mean(0), after_RQ.mean(0), repeats=len(folders))
    before, after = ([int(count) for count in passed_RQ.sum(1)] for passed_RQ in (before_RQ, after_RQ))
    return DemoAverage(before, after, len(questions), difference)


def _verdicts(folder: str, questions: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """Whether each question's answer passed, before and after training."""
    try:
        rows = [row for row in RunFolder(folder).samples() if isinstance(row, dict) and "passed_after" in row]
    except DataError as problem:
        raise RunError(f"{folder}: its samples are damaged ({problem}); run preftree demo again") from problem
    if [row.get("question") for row in rows] != list(questions):
        raise RunError(
            f"{folder} holds no whole demo ({len(rows)} of {len(questions)} held-out prompts answered); "
            "preftree demo --output_dir makes one"
        )
    return [bool(row.get("passed_before")) for row in rows], [bool(row["passed_after"]) for row in rows]
