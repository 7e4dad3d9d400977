"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while training.

A sequence of L tokens and D dimensions gets noise from ±α/√(L·D) per entry. A token of a tree belongs to several
sequences; it gets the noise of the longest. Trainer's own hook would take a whole forest for one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from preftree.forest import Forest, upload


class EmbeddingNoise:
    """Noise on a model's input embeddings, switched on for single passes.

    Args:
        embeddings: the model's input embeddings, to which a hook is added.
        alpha: the noise's α.
    """

    def __init__(self, embeddings: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self._forest: Forest | None = None
        self.handle = embeddings.register_forward_hook(self._hook)

    @contextmanager
    def on(self, forest: Forest) -> Iterator[None]:
        """Noise on the embeddings of `forest`, for as long as the block lasts."""
        self._forest = forest
        try:
            yield
        finally:
            self._forest = None

    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self._forest is None:
            return output
        length = longest_paths(self._forest)
        if output.shape[:2] != (1, len(length)):  # single sequences
            length = output.new_full((output.shape[1],), output.shape[1])
        bound = self.alpha / torch.sqrt(length.to(output.dtype) * output.shape[-1])
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * bound[None, :, None]


def longest_paths(forest: Forest) -> Tensor:
    """For each token the tokens of the longest sequence that it is part of, (T,)."""

    def measured() -> Tensor:
        lengths = [segment.position + segment.end - segment.start for segment in forest.segments]
        for index in range(len(lengths) - 1, -1, -1):  # children come after their parents
            if (parent := forest.segments[index].parent) >= 0:
                lengths[parent] = max(lengths[parent], lengths[index])
        each = [length for s, length in zip(forest.segments, lengths, strict=True) for _ in range(s.start, s.end)]
        return upload(each, forest.device)

    return forest.cached("longest_paths", measured)
