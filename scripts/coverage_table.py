"""What `model_coverage.py` found, as the table of docs/models.md."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import re
from collections import Counter
from collections.abc import Sequence

#: What a family has to keep: float32 against float64 unless its own rounding is larger, and units of that rounding.
FLOAT32_LIMIT, NOISE_LIMIT = 1e-4, 3.0


@dataclasses.dataclass
class Row:
    """What was found for a family; None where it could not be measured."""

    family: str
    path: str = ""
    logprob_error: float | None = None
    gradient_error: float | None = None
    logprob_noise: float | None = None
    gradient_noise: float | None = None
    half_path: str = ""
    half_error: float | None = None
    half_gradient_error: float | None = None
    half_noise: float | None = None
    half_gradient_noise: float | None = None
    first_loss: float | None = None
    trains: bool = False
    reason: str = ""
    traceback: str = ""
    commit: str = ""

    @property
    def problems(self) -> list[str]:
        """Where the family misses what is promised; a refusal in words is no problem."""
        found = ["ends in a traceback"] if self.traceback else []
        exact = (
            ("log-probs", self.logprob_error, self.logprob_noise),
            ("gradients", self.gradient_error, self.gradient_noise),
        )
        for what, error, noise in exact:
            if error is not None and not error <= max(FLOAT32_LIMIT, NOISE_LIMIT * (noise or 0.0)):
                found.append(f"{what} off by {error:.1g} in float32")
        halves = (
            ("log-probs", self.half_error, self.half_noise),
            ("gradients", self.half_gradient_error, self.half_gradient_noise),
        )
        for what, error, noise in halves:
            if error is not None and noise is not None and not error <= NOISE_LIMIT * noise:
                found.append(f"{what} off by {error / noise:.1f} times the model's own rounding in bfloat16")
        if self.first_loss is not None and not abs(self.first_loss - math.log(2)) < 1e-4:
            found.append(f"first loss {self.first_loss:.6f}")
        return found


def table(rows: Sequence[Row]) -> str:
    """The rows as docs/models.md shows them."""
    head = (
        "| family | path | log-probs f32 (own) | gradients f32 (own) | log-probs bf16 (own) | gradients bf16 (own) "
        "| trains | why |"
    )
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        path = row.path if row.half_path in ("", row.path) else f"{row.path}, bfloat16 {row.half_path}"
        tree = row.path and row.path not in ("padded", "plain") and row.half_path == row.path
        why = "" if tree and row.trains and not row.traceback else row.reason
        notes = [*row.problems, re.sub(r" in folder \S+", "", why).replace("|", "/")]  # the folder was temporary
        lines.append(
            f"| {row.family} | {path or '-'} | {_short(row.logprob_error)} ({_short(row.logprob_noise)}) | "
            f"{_short(row.gradient_error)} ({_short(row.gradient_noise)}) | "
            f"{_short(row.half_error)} ({_short(row.half_noise)}) | "
            f"{_short(row.half_gradient_error)} ({_short(row.half_gradient_noise)}) | "
            f"{'yes' if row.trains else 'no'} | {'; '.join(note for note in notes if note)[:300]} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1g}"


def document(rows: Sequence[Row], total: int) -> str:
    """The text of docs/models.md.

    Args:
        total: families there are; fewer rows are a run that was interrupted.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    commits = ", ".join(f"{commit} ({count})" for commit, count in Counter(row.commit for row in rows).items())
    trees = sum(row.path not in ("", "padded", "plain") for row in rows)
    padded = sum(row.path in ("padded", "plain") for row in rows)
    bad = [row for row in rows if row.problems]
    return (
        "# Model families\n\n"
        f"Made by `scripts/model_coverage.py` on {datetime.date.today()} with {versions}, on a CPU, at commits (rows) "
        f"{commits}.\nNothing here is written by hand; the script's first lines say what is measured and how.\n\n"
        f"{len(rows)} of {total} families and variants: {trees} as token trees, {padded} as single sequences, "
        f"{len(rows) - trees - padded} refused or not text models; {sum(row.trains for row in rows)} train with "
        f"default flags. Beyond the limits ({FLOAT32_LIMIT:g} in float32 or {NOISE_LIMIT:g} times the model's own "
        f"float32 rounding where that is more, {NOISE_LIMIT:g} times its own bfloat16 rounding, no traceback, first "
        f"loss ln 2): {', '.join(row.family for row in bad) or 'none'}.\n\n"
        "Errors are the largest of any log-prob (in nats) and of any LoRA gradient (relative to its tensor's largest "
        "entry). In brackets: the model's own code in that precision, one sequence at a time. `native` and so on are "
        "backends of the token tree; `padded` and `plain` compute single sequences.\n\n"
    ) + table(rows)
