"""What a model thinks of held-out pairs, without reference to any other model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from preftree.forest import Pair, forests_of_pairs
from preftree.model.score import evaluating, leaf_logprobs


@dataclass(frozen=True, eq=False)
class PairScores:
    """log p(answer | prompt) of P pairs under one model, in the order of the pairs; all of shape (P,)."""

    chosen_P: Tensor
    rejected_P: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer is the more probable one."""
        return float((self.chosen_P > self.rejected_P).double().mean())

    @property
    def margin(self) -> float:
        """Mean of log p(chosen) − log p(rejected), in nats."""
        return float((self.chosen_P - self.rejected_P).mean())


def score_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    budget: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Score `pairs` in forests of at most `budget` tokens.

    Args:
        model: as `leaf_logprobs` takes it; its training mode is restored.
        progress: called with (pairs done, pairs in all) after each forest.
    """
    device = next(model.parameters()).device
    sums: dict[int, Tensor] = {}
    with evaluating(model):
        for forest in forests_of_pairs(pairs, budget, device):
            scores = leaf_logprobs(model, forest)
            sums.update(zip(scores.leaf_ids, scores.sum_L.double().cpu(), strict=True))
            if progress is not None:
                progress(len(sums) // 2, len(pairs))
    ordered_L = torch.stack([sums[leaf] for leaf in range(2 * len(pairs))])
    return PairScores(ordered_L[0::2], ordered_L[1::2])
