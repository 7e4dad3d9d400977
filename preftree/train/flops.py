"""Useful arithmetic: what no exact method can leave out, against what the machine can do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftree.train.metrics import SpeedMeter


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model's matrix products, and the peak they are measured against.

    With N weights in the linear layers below the head, a tree token costs 2N forward and 2N backward (frozen weights
    need no gradient of their own), and 2N more where the reference computes it. The head counts at scored tokens
    only. Attention is not counted.

    Args:
        per_token: 2N.
        per_scored: twice the weights of the head.
        peak: FLOP/s of a large matrix product on one rank's device (`device.gemm_peak`).
    """

    per_token: int
    per_scored: int
    peak: float

    @classmethod
    def of(cls, model: PreTrainedModel, peak: float) -> ModelFlops:
        head = model.get_output_embeddings()
        body = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in name
        )
        return cls(2 * body, 2 * head.weight.numel(), peak)

    def useful(self, speed: SpeedMeter) -> int:
        """FLOPs of the steps in `speed`."""
        tokens = 2 * speed.tree_tokens + speed.reference_tokens
        scored = 2 * speed.scored_tokens + speed.reference_scored
        return tokens * self.per_token + scored * self.per_scored

    def mfu(self, speed: SpeedMeter, ranks: int = 1) -> float:
        """Share of the peak of all ranks that useful arithmetic took, over the seconds of `speed`."""
        return self.useful(speed) / (speed.seconds * self.peak * ranks)
