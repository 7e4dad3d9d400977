"""What a layer asks of its attention besides the forest's mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from preftree.errors import ModelError
from preftree.forest import Forest


@dataclass(frozen=True, eq=False)
class Rules:
    """Args:
    scale: factor on query·key.
    window: a token sees this many tokens of its own path, itself included; None is all.
    chunk: paths are cut into chunks of this many tokens, and a token sees its own chunk only (Llama 4); None is all.
    softcap: scores become `softcap · tanh(score / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
    slopes_H: ALiBi slopes (arXiv 2108.12409): `-slope · (query position - key position)` on the path.
    sinks_H: the score of one more key per head, which every token sees and whose value is zero (gpt-oss).
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    slopes_H: Tensor | None = None
    sinks_H: Tensor | None = None

    def __post_init__(self) -> None:
        # Backends leave out of ALiBi what is equal for all keys of a query; beside a sink it would count.
        if self.slopes_H is not None and self.sinks_H is not None:
            raise ModelError("attention with both ALiBi and sinks is not supported over trees; no known model has both")

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """What, besides the forest, decides which keys a token sees."""
        return self.window, self.chunk

    def for_forest(self, forest: Forest) -> Rules:
        """The same without a window and a chunk that hide nothing in `forest`."""
        window = None if self.window is not None and self.window >= forest.depth else self.window
        chunk = None if self.chunk is not None and self.chunk >= forest.depth else self.chunk
        return self if (window, chunk) == self.reach else replace(self, window=window, chunk=chunk)


def first_seen(position_N: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """The first path position that tokens at these positions see."""
    first_N = torch.zeros_like(position_N)
    if window is not None:
        first_N = torch.maximum(first_N, position_N - window + 1)
    if chunk is not None:
        first_N = torch.maximum(first_N, position_N - position_N % chunk)
    return first_N
