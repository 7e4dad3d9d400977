"""The demo's rows as they are shipped: prompts with a check, the right answer, and a wrong one of the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

DATA_FOLDER = Path(__file__).parent / "data"
"""Where train.jsonl and heldout.jsonl are."""


def read_split(split: Split) -> list[dict[str, str]]:
    """The rows of a split: system, question, chosen, rejected, kind and check (JSON text)."""
    with (DATA_FOLDER / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
