"""What a layer asks of its attention besides the forest's mask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rules:
    """Args:
    scale: factor on query·key.
    window: a token sees this many tokens of its own path, itself included; None is all.
    softcap: scores become `softcap · tanh(score / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
    slopes_H: ALiBi slopes (arXiv 2108.12409): `-slope · (query position - key position)` on the path.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes_H: Tensor | None = None
