"""Merging with the whole model in memory, where it cannot be done one layer at a time."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from transformers import PreTrainedModel

from preftree.merge.verify import Verified, check_weights
from preftree.model.adapted import TrainedRun, open_trained
from preftree.model.load import load_model, resolve


class WholeModel:
    """A base model with an adapter merged in, in memory.

    Args:
        dtype: of what is written; merging itself is done in float32.
    """

    def __init__(self, run: TrainedRun, dtype: torch.dtype) -> None:
        self.model: PreTrainedModel | None = (
            open_trained(run, "cpu", torch.float32).merge_and_unload(safe_merge=True).to(dtype)
        )

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of the model in `dtype`."""
        return 0 if self.model is None else sum(p.numel() * dtype.itemsize for p in self.model.parameters())

    def write(self, folder: Path) -> None:
        """Config and weights, under the names that transformers gives its files."""
        assert self.model is not None
        self.model.save_pretrained(folder)

    def check(self, folder: Path) -> Verified:
        """Compare what is read from `folder` with what is in memory. Raises VerificationError."""
        assert self.model is not None
        found = load_model(resolve(str(folder)), self.model.dtype).state_dict()
        expected = self.model.state_dict()
        return check_weights(expected, expected.__getitem__, found.__getitem__, found)

    def free(self) -> None:
        """Give the memory back."""
        self.model = None
        gc.collect()
