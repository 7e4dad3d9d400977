"""Sums over pairs, so that a mean is a mean over pairs and never an average of averages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from preftree.forest import Forest
from preftree.train.losses import PairLogps
from preftree.train.objective import Objective

NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


#: Sums over tokens, in the order in which `PairLogps.tokens` has them.
TOKEN_SUMS = ("entropy", "tokens", "chosen_logits", "rejected_logits", "chosen_top1", "chosen_tokens")
#: All sums that a meter holds: those over pairs, those over tokens, the routers' loss of each pair, and of ranked lists
#: the share of answers in the right order and their number.
_COLUMNS = len(NAMES) + len(TOKEN_SUMS) + 3


@dataclass
class PairMeter:
    """Adds up what is reported of pairs, on their device; `means()` reads it once.

    Args:
        pairs: how many.
        total: sums of `NAMES` over pairs, those of `TOKEN_SUMS`, that of the routers' losses, and those of lists.
    """

    pairs: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(_COLUMNS))

    @classmethod
    def on(cls, device: torch.device) -> PairMeter:
        """A meter for a device, in the widest floating type that every device of its kind has."""
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        return cls(total=torch.zeros(_COLUMNS, dtype=dtype, device=device))

    def add(self, logps: PairLogps, losses_P: Tensor, objective: Objective) -> None:
        """The pairs of one forest: losses, implicit rewards, and log-probs.

        Padding adds zeros only.
        """
        chosen_P, rejected_P = (reward_P.detach() for reward_P in objective.rewards(logps))
        columns = (
            losses_P.detach(),
            chosen_P,
            rejected_P,
            (chosen_P > rejected_P).to(chosen_P.dtype),
            chosen_P - rejected_P,
            logps.chosen_P.detach(),
            logps.rejected_P.detach(),
        )
        sums = torch.stack([column_P.to(self.total.dtype).sum() for column_P in columns])
        tokens = sums.new_zeros(len(TOKEN_SUMS)) if logps.tokens is None else logps.tokens.to(sums.dtype)
        router = sums.new_zeros(1) if logps.router_P is None else logps.router_P.detach().sum().to(sums.dtype)[None]
        lists = sums.new_zeros(2)
        if (in_order_P := objective.in_order(logps)) is not None:
            lists = torch.stack([in_order_P.sum().to(sums.dtype), sums.new_tensor(logps.pairs)])
        self.total = self.total + torch.cat([sums, tokens, router, lists])
        self.pairs += logps.pairs

    def merge(self, other: PairMeter) -> None:
        """Add what another meter has seen."""
        self.total = self.total.to(other.total) + other.total
        self.pairs += other.pairs

    def means(self) -> dict[str, float]:
        """Means over all pairs added, and over their tokens where these were told; empty when there were no pairs."""
        if not self.pairs:
            return {}
        values = self.total.tolist()
        means = {name: value / self.pairs for name, value in zip(NAMES, values[: len(NAMES)], strict=True)}
        *tokens, router, in_order, lists = values[len(NAMES) :]
        sums = dict(zip(TOKEN_SUMS, tokens, strict=True))
        if router:
            means["aux_loss"] = router / self.pairs
        if lists:
            means["rewards/rank_accuracies"] = in_order / lists
        if sums["tokens"]:
            chosen = max(sums["chosen_tokens"], 1.0)
            means["entropy"] = sums["entropy"] / sums["tokens"]
            means["logits/chosen"] = sums["chosen_logits"] / chosen
            means["logits/rejected"] = sums["rejected_logits"] / max(sums["tokens"] - sums["chosen_tokens"], 1.0)
            means["mean_token_accuracy"] = sums["chosen_top1"] / chosen
        return means


@dataclass
class SpeedMeter:
    """Tokens, pairs and seconds since it was made; `reference_…` is what the reference computed. Every field but the
    start is a count that adds up over ranks, except `slowest_tokens`: the tree tokens of each step's most loaded rank.
    """

    tree_tokens: int = 0
    unrolled_tokens: int = 0
    pairs: int = 0
    forests: int = 0
    scored_tokens: int = 0
    reference_tokens: int = 0
    reference_scored: int = 0
    slowest_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, forest: Forest) -> None:
        self.tree_tokens += len(forest.tokens)  # without padding
        self.unrolled_tokens += forest.unrolled_tokens
        self.forests += 1
        self.scored_tokens += len(forest.target_S)

    def add_reference(self, forest: Forest) -> None:
        """A forest that the reference computed, too."""
        self.reference_tokens += len(forest)
        self.reference_scored += len(forest.target_S)

    @classmethod
    def names(cls) -> list[str]:
        """The counts, in the order of `counts`."""
        return [field.name for field in fields(cls) if field.name != "started"]

    def counts(self) -> list[int]:
        return [getattr(self, name) for name in self.names()]

    @classmethod
    def of_ranks(cls, counts: Sequence[Sequence[int]]) -> SpeedMeter:
        """One step of all ranks, from the `counts` of each."""
        meter = cls(*(sum(column) for column in zip(*counts, strict=True)))
        meter.slowest_tokens = max(row[cls.names().index("tree_tokens")] for row in counts)
        return meter

    def merge(self, other: SpeedMeter) -> None:
        """Add another meter's counts; the seconds stay this one's own."""
        for name in self.names():
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def saved_share(self) -> float:
        """Share of the tokens of single, unpadded sequences that the trees did not compute."""
        return 1 - self.tree_tokens / self.unrolled_tokens if self.unrolled_tokens else 0.0

    def imbalance(self, ranks: int) -> float:
        """Tokens of the most loaded rank over the mean of all ranks, minus 1: what waiting for it costs at most."""
        return ranks * self.slowest_tokens / self.tree_tokens - 1 if self.tree_tokens else 0.0

    @property
    def seconds(self) -> float:
        """Since it was made, never 0."""
        return max(time.perf_counter() - self.started, 1e-9)

    def rates(self) -> dict[str, float]:
        """pairs_per_second, tokens_per_second (tree tokens) and the saved share."""
        return {
            "pairs_per_second": self.pairs / self.seconds,
            "tokens_per_second": self.tree_tokens / self.seconds,
            "tokens_saved": self.saved_share,
        }


@dataclass
class LiveMetrics:
    """What the live line reads: the last step's pairs, the speed since the run began, and names of warnings."""

    step: PairMeter = field(default_factory=PairMeter)
    speed: SpeedMeter = field(default_factory=SpeedMeter)
    warnings: list[str] = field(default_factory=list)
