"""Are the weights that were loaded the model's own: all of them, of its shapes, finite, and fit for the tokenizer?

transformers initializes what a checkpoint lacks at random and leaves out what the model has no place for, with a
warning. Such a model trains without an error and is worth nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preftree.errors import ModelError

_SHOWN = 5


def refuse_incomplete(model: PreTrainedModel, info: Mapping[str, Any], described: str) -> None:
    """Raise ModelError unless checkpoint and model have the same weights.

    Args:
        info: what `from_pretrained(…, output_loading_info=True)` returns beside the model. It is free of tied weights
            and of those that the model's class declares it can do without.
    """
    mismatched = sorted(info.get("mismatched_keys", ()))
    shapes = [f"{name} {tuple(found)} instead of {tuple(expected)}" for name, found, expected in mismatched]
    kinds = (
        ("missing from the files", sorted(info.get("missing_keys", ()))),
        ("without a place in the model", sorted(info.get("unexpected_keys", ()))),
        ("of another shape", shapes),
        ("that cannot be converted", sorted(map(str, info.get("error_msgs", ())))),
    )
    problems = [f"{len(names)} weights {what}: {_listed(names)}" for what, names in kinds if names]
    if problems:
        raise ModelError(
            f"the weights in {described} are not those of a {type(model).__name__} (model_type "
            f"{model.config.model_type} in config.json). {'; '.join(problems)}. Training would start from random "
            "weights in their place. Get the files again, or correct config.json"
        )


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], described: str) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not _finite(tensor)]
    if broken:
        raise ModelError(
            f"{len(broken)} weights in {described} hold NaN or infinite values: {_listed(broken)}. Nothing can be "
            "learned or measured from there; get the files again, or take an earlier checkpoint"
        )


def refuse_larger_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    """Raise ModelError if the tokenizer can give a token id for which the model has no embedding."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        raise ModelError(
            f"the tokenizer has {len(beyond)} tokens without an embedding in {name}, whose vocabulary ends at id "
            f"{rows - 1}: {_listed([f'{token!r} ({number})' for number, token in beyond])}. Give the model's own "
            "tokenizer (--tokenizer_name), or resize the model's embeddings first (model.resize_token_embeddings)"
        )


def _finite(tensor: Tensor) -> bool:
    """In one pass and without a copy: the extremes are finite, and NaN is an extreme."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    return bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
