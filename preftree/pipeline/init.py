"""`preftree init`: a commented pipeline for a model and its data, with lengths that fit what was found in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from preftree.config.pipeline import InitSettings
from preftree.data.encode import BATCH, PairEncoder
from preftree.data.sources import load_pairs
from preftree.errors import DataError, RunError
from preftree.hardware.device import choose_device
from preftree.io.atomic import atomic_file
from preftree.io.console import sayer, visible
from preftree.model.load import load_tokenizer, resolve_tokenizer

#: Pairs that are looked at, the first ones.
_LOOKED_AT = 4000
#: Lengths are rounded up to a multiple of this.
_ROUND = 64


@dataclass(frozen=True)
class DataSummary:
    """What was found out: the form of the data, and tokens at the median, the 99th percentile and the most."""

    format: str
    pairs: int
    prompt: tuple[int, int, int]
    answer: tuple[int, int, int]
    dropped: int
    notes: list[str]

    @property
    def max_prompt_length(self) -> int:
        return _rounded(self.prompt[1])

    @property
    def max_length(self) -> int:
        return self.max_prompt_length + _rounded(self.answer[1])


def init(settings: InitSettings, console: Console | None = None) -> Path:
    """Write the file; returns its path.

    Raises:
        PreftreeError: the data or the tokenizer cannot be read, or the file is there already.
    """
    say = sayer(console or Console())
    path = Path(settings.out)
    if path.exists():
        raise RunError(f"--out {path} exists and is not overwritten. Give another name, or delete it.")
    model, data = settings.model_name_or_path or "", settings.dataset_name or ""
    tokenizer = load_tokenizer(resolve_tokenizer(model))
    found = look_at(data, tokenizer)
    device = choose_device("auto")
    text = (
        _environment()
        .get_template("pipeline.yaml.j2")
        .render(
            model=model,
            data=data,
            found=found,
            device=device.value,
            reason=device.reason,
            template="its own" if getattr(tokenizer, "chat_template", None) else "none: plain text, as in docs/data.md",
            steps=math.ceil(found.pairs / 16),
        )
    )
    try:
        with atomic_file(path, "w") as file:
            file.write(text)
    except OSError as problem:
        raise RunError(f"--out {path} cannot be written ({problem.strerror or problem}). Give another.") from problem
    say(f"data       {found.pairs} pairs in the format {found.format}")
    say(f"lengths    prompts {_lengths(found.prompt)}, answers {_lengths(found.answer)}")
    say(f"saved      {path}")
    say(f"next       preftree run {path} --dry-run")
    return path


def look_at(data: str, tokenizer: Any) -> DataSummary:
    """Read and tokenize the first pairs. Raises DataError where none can be used."""
    loaded = load_pairs(data, limit=_LOOKED_AT)
    encoder = PairEncoder(tokenizer, max_length=None)
    fates = [fate for start in range(0, len(loaded), BATCH) for fate in encoder.encode(loaded[start : start + BATCH])]
    kept = [fate.encoded for fate in fates if fate.encoded is not None]
    if not kept:
        reasons = ", ".join(encoder.report.dropped) or "it has none"
        raise DataError(f"{data}: no pair can be trained on ({reasons}).")
    return DataSummary(
        format=str(loaded.format),
        pairs=len(kept),
        prompt=_summary([len(pair.prompt_ids) for pair in kept]),
        answer=_summary([max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in kept]),
        dropped=len(fates) - len(kept),
        notes=encoder.report.notes,
    )


def _summary(lengths: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(lengths)
    return ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))], ordered[-1]


def _lengths(found: tuple[int, int, int]) -> str:
    return f"{found[0]} tokens at the median, {found[1]} at 99 %, {found[2]} at most"


def _rounded(length: int) -> int:
    return max(_ROUND, -(-length // _ROUND) * _ROUND)


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("preftree.pipeline"), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)  # fmt: skip
    environment.filters["one_line"] = lambda value: " ".join(visible(str(value)).split())
    environment.filters["lengths"] = _lengths
    return environment
