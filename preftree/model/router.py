"""The load-balancing loss of mixtures of experts (Switch Transformer, arXiv 2101.03961, eq. 4 to 6).

A model asks for it by `output_router_logits: true` in its config, with `router_aux_loss_coef` as its weight. It is a
product of two means over tokens, so it is not a sum over parts of a batch. Here the batch is one pair, as TRL's with
one pair per device: whichever forest a pair is in, its loss is the same. A token of a shared prompt counts once for
each answer under it, as it does where every answer carries its own copy.

Shape suffixes: P pairs, R rows that the routers see (tokens of a forest, or of single sequences).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.forest import Forest
from preftree.model.score import Scorer

#: Of one pass through the model: for each mixture layer the router's logits, (R, experts).
Logits = tuple[Tensor, ...]


class RouterLoss:
    """Computes the loss of an attached model, from what its routers gave while a forest was scored.

    Args:
        function: the family's own `load_balancing_loss_func`.
        top_k: experts per token.
        coefficient: weight of the loss.
    """

    def __init__(self, scorer: Scorer, function: Callable[..., Tensor], top_k: int, coefficient: float) -> None:
        self.scorer, self.function, self.top_k, self.coefficient = scorer, function, top_k, coefficient

    @classmethod
    def of(cls, scorer: Scorer) -> RouterLoss | None:
        """None for a model that is no mixture, does not ask for the loss, or has one of another form (Doge)."""
        causal: PreTrainedModel = scorer.causal
        config = causal.config.get_text_config()
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        function = getattr(sys.modules[type(causal).__module__], "load_balancing_loss_func", None)
        if not getattr(config, "output_router_logits", False) or not coefficient or function is None:
            return None
        if list(inspect.signature(function).parameters) != ["gate_logits", "num_experts", "top_k", "attention_mask"]:
            return None
        return cls(scorer, function, int(config.num_experts_per_tok), float(coefficient))

    @contextmanager
    def recording(self) -> Iterator[list[Logits]]:
        """Collect the routers' logits of each pass through the model while the block lasts."""
        passes: list[Logits] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if getattr(output, "router_logits", None):
                passes.append(tuple(output.router_logits))

        hook = self.scorer.causal.base_model.register_forward_hook(keep)
        try:
            yield passes
        finally:
            hook.remove()

    def losses(self, passes: Sequence[Logits], forest: Forest, pairs: Sequence[Sequence[int]]) -> Tensor:
        """The weighted loss of each pair, (P,), differentiable.

        Args:
            passes: what `recording` gave for `forest`.
            pairs: each pair's answers, as positions in the forest's layout.
        """
        if not passes:  # without a mixture among its layers
            return torch.zeros(len(pairs), device=forest.device)
        logits = tuple(torch.cat([each.flatten(0, -2) for each in layer]) for layer in zip(*passes, strict=True))
        counts_LR = forest.cached(("router", self.scorer.name), lambda: self._counts(forest, len(logits[0])))
        parts = [
            self.function(logits, logits[0].shape[-1], self.top_k, counts_LR[list(leaves)].sum(0)) for leaves in pairs
        ]
        return self.coefficient * torch.stack(parts)

    def _counts(self, forest: Forest, rows: int) -> Tensor:
        """How often each row stands for a token of each answer's sequence, prompt included: (leaves, R)."""
        counts_LR = torch.zeros(len(forest.leaf_lengths), rows)
        if self.scorer.shares_prompts:
            for leaf, segment in enumerate(forest.leaf_segments):
                for index in (*forest.ancestors(segment), segment):
                    span = forest.segments[index]
                    counts_LR[leaf, span.start : span.end] = 1
            return counts_LR.to(forest.device)
        # Single sequences: padded to one length in one pass, or one after another.
        lengths = [len(sequence) for sequence in forest.unrolled_ids()]
        longest = rows // len(lengths) if rows == len(lengths) * max(lengths) else None
        start = 0
        for leaf, length in enumerate(lengths):
            counts_LR[leaf, start : start + length] = 1
            start += longest or length
        return counts_LR.to(forest.device)
