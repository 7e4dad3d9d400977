"""Sums over pairs, so that a mean is a mean over pairs and never an average of averages."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from preftree.forest import Forest
from preftree.train.losses import PairLogps

NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass
class PairMeter:
    """Adds up what is reported of pairs, on their device; `means()` reads it once."""

    pairs: int = 0
    total: Tensor | None = None  # one sum a name, float64

    def add(self, logps: PairLogps, losses_P: Tensor, beta: float) -> None:
        """The pairs of one forest: losses, implicit rewards β·log π/r, and log-probs."""
        chosen_P, rejected_P = beta * logps.chosen_ratio_P.detach(), beta * logps.rejected_ratio_P.detach()
        columns = (
            losses_P.detach(),
            chosen_P,
            rejected_P,
            (chosen_P > rejected_P).to(chosen_P.dtype),
            chosen_P - rejected_P,
            logps.chosen_P.detach(),
            logps.rejected_P.detach(),
        )
        wide = torch.float64 if losses_P.device.type == "cpu" else torch.float32
        sums = torch.stack([column_P.to(wide).sum() for column_P in columns])
        self.total = sums if self.total is None else self.total + sums
        self.pairs += int(losses_P.shape[0])

    def means(self) -> dict[str, float]:
        """Mean over all pairs added, by name; empty when there were none."""
        if self.total is None or not self.pairs:
            return {}
        return {name: value / self.pairs for name, value in zip(NAMES, self.total.tolist(), strict=True)}


@dataclass
class SpeedMeter:
    """Tokens, pairs and seconds since it was made."""

    tree_tokens: int = 0
    unrolled_tokens: int = 0
    pairs: int = 0
    forests: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, forest: Forest) -> None:
        self.tree_tokens += len(forest)
        self.unrolled_tokens += forest.unrolled_tokens
        self.pairs += len(forest.leaf_ids) // 2
        self.forests += 1

    @property
    def saved_share(self) -> float:
        """Share of the tokens of single, unpadded sequences that the trees did not compute."""
        return 1 - self.tree_tokens / self.unrolled_tokens if self.unrolled_tokens else 0.0

    def rates(self) -> dict[str, float]:
        """pairs_per_second, tokens_per_second (tree tokens) and the saved share."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "pairs_per_second": self.pairs / seconds,
            "tokens_per_second": self.tree_tokens / seconds,
            "tokens_saved": self.saved_share,
        }


@dataclass
class Pulse:
    """What the live line reads: the last step's pairs, and the speed since the run began."""

    step: PairMeter = field(default_factory=PairMeter)
    speed: SpeedMeter = field(default_factory=SpeedMeter)
