"""What a kind of prompt is, and how its rows are drawn.

A kind is a name, wordings for training and others for the held-out set, and a function that fills
the slots of a wording from the split's own pool of texts. Nothing is shared between the two splits
but the ability that is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preftree.demo.rows import Split

_SYSTEMS: dict[Split, tuple[str, ...]] = {
    "train": ("Be brief.", "Follow the format.", "Give only what is asked."),
    "heldout": ("Do exactly as told.", "Keep to the point."),
}
_SYSTEM_SHARE = 0.1
_MAX_DRAWS = 2000


@dataclass(frozen=True)
class Filled:
    """The slots of one wording, the answer written for them, and the check that this answer passes.

    `near_miss` is a wrong answer that is easily mistaken for the right one; "" leaves it to `near_miss.py`.
    """

    slots: dict[str, str]
    chosen: str
    check: dict[str, Any]
    near_miss: str = ""


@dataclass(frozen=True)
class Kind:
    """One ability, asked for in several wordings."""

    name: str
    train: tuple[str, ...]
    """Wordings with {slots}, used in training only."""
    heldout: tuple[str, ...]
    """Other wordings of the same request, with the same slots, never seen in training."""
    fill: Callable[[Split, random.Random], Filled]

    def wordings(self, split: Split) -> tuple[str, ...]:
        """The wordings of one split."""
        return self.train if split == "train" else self.heldout


@dataclass(frozen=True)
class Example:
    """A prompt with its right answer: a row of the demo set that still lacks the rejected answer."""

    kind: str
    system: str
    question: str
    chosen: str
    check: dict[str, Any]
    near_miss: str = ""


def draw(kind: Kind, split: Split, count: int, seed: int) -> list[Example]:
    """`count` different prompts of one kind, the wordings taking turns; equal seeds, equal prompts.

    Raises ValueError when the kind's pools are too small for `count` different prompts.
    """
    rng = random.Random(f"{seed}/{split}/{kind.name}")
    wordings = kind.wordings(split)
    examples: dict[str, Example] = {}
    for _ in range(_MAX_DRAWS):
        if len(examples) == count:
            return list(examples.values())
        wording = wordings[len(examples) % len(wordings)]
        filled = kind.fill(split, rng)
        question = wording.format(**filled.slots)
        system = rng.choice(_SYSTEMS[split]) if rng.random() < _SYSTEM_SHARE else ""
        example = Example(kind.name, system, question, filled.chosen, filled.check, filled.near_miss)
        examples.setdefault(question, example)
    raise ValueError(f"kind {kind.name!r} has fewer than {count} different {split} prompts; widen its pools")
