"""A model by its content: a hash of config and weights, never of a name or a place."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedConfig


def add_model(digest: xxhash.xxh3_128, config: PreTrainedConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put a config, without names of places and versions, and named tensors with their dtypes into `digest`."""
    content = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and "transformers" not in k}
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
