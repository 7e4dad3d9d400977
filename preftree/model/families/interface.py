"""Models that take their attention from transformers' `AttentionInterface`: nearly all of them.

The model is switched to an implementation of ours, once. Where it is handed a `ForestMask` it runs one of our backends;
otherwise it does what the model did before (`sdpa`, or its own eager code), so that `generate` and plain forwards stay
as they are.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import logging

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.model.attention import Attend, Rules
from preftree.model.families.mask import NO_DROPOUT, ForestMask, ForestPass, mask_interface, run, running
from preftree.model.patch import Patches

#: Our implementations, by what they do without a forest.
NAMES = {"sdpa": "preftree", "eager": "preftree_eager"}

#: Keywords that a layer may pass and that change nothing here: either they restate the forest's own positions,
#: causality and the mask's window, or they concern caching.
_HARMLESS = {
    "position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "cache_params", "sliding_window",
}  # fmt: skip


def prepare(model: PreTrainedModel, patches: Patches):  # type: ignore[no-untyped-def]
    """See `families.prepare`."""
    for name, stock in ((NAMES["sdpa"], sdpa_mask), (NAMES["eager"], eager_mask)):
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, mask_interface(stock))
    # Eager attention stays eager: sdpa, for one, would drop Gemma 2's softcap when it generates.
    stays_eager = model.config._attn_implementation in ("eager", NAMES["eager"]) and _eager_attention(model) is not None
    set_attention(model, NAMES["eager" if stays_eager else "sdpa"], patches)
    kinds: list[tuple[int | None, int | None]] = []

    def body(forest: Forest, attend: Attend) -> Tensor:
        # A mask of padding, of which there is none. Without it, positions that start again would be taken for packed
        # sequences.
        return run_body(model, ForestPass(forest, attend, kinds), torch.ones_like(forest.input_ids_T)[None])

    return body


def mask_body(model: PreTrainedModel):  # type: ignore[no-untyped-def]
    """A body for models whose layers are handed the mask that the model is called with, if it has four dimensions."""

    def body(forest: Forest, attend: Attend) -> Tensor:
        forest_pass = ForestPass(forest, attend, [])
        return run_body(model, forest_pass, forest_pass.mask_of((None, None)))

    return body


def run_body(model: PreTrainedModel, forest_pass: ForestPass, attention_mask: Tensor) -> Tensor:
    """Hidden states (T, D) of a pass's forest after the final norm.

    Raises:
        ModelError: not every layer attended to the forest.
    """
    body, layers, forest = body_of(model), model.config.get_text_config().num_hidden_layers, forest_pass.forest
    with run(forest_pass):
        output = body(
            input_ids=forest.input_ids_T[None],
            position_ids=forest.position_ids_T[None],
            attention_mask=attention_mask,
            use_cache=False,
        )
    if forest_pass.attended < layers:
        raise ModelError(f"{layers - forest_pass.attended} of {layers} layers attend in a way that trees cannot reach")
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head; `base_model` is the model itself where its prefix names what only a relative has."""
    candidates = (model.base_model, model.get_decoder(), getattr(model, "model", model))
    return next(body for body in candidates if body is not model)


def set_attention(model: PreTrainedModel, name: str, patches: Patches | None = None) -> None:
    """Switch a model's own attention, until `patches` are undone if there are any."""
    before = getattr(model.config, "_attn_implementation", None) or "eager"
    if before != name and patches is not None:
        patches.on_undo(partial(set_attention, model, before))
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model.set_attn_implementation(name)
    finally:
        logging.set_verbosity(level)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Query (1, H, T, D), key and value (1, K, T, D) to (1, T, H, D)."""
    if isinstance(attention_mask, ForestMask):
        rules, heads = _rules(module, query.shape[-1], attention_mask, options), (query[0], key[0], value[0])
        return in_one_dtype(attention_mask.attend, heads, attention_mask.forest, rules)[None], None
    if running() is not None:
        raise ModelError(f"attention of {type(module).__name__} is given no mask, so that trees cannot reach it")
    stock = sdpa_attention_forward
    if module.config._attn_implementation == NAMES["eager"]:  # type: ignore[union-attr]
        stock = _eager_attention(module)
    return stock(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _rules(module: nn.Module, head_size: int, mask: ForestMask, options: dict[str, Any]) -> Rules:
    """What a layer asks of its attention, by its mask and the keywords that it passes."""
    given = {name: value for name, value in options.items() if value is not None and name not in _HARMLESS}
    scale = given.pop("scaling", head_size**-0.5)
    dropout, softcap, sinks_H = (given.pop(name, None) for name in ("dropout", "softcap", "s_aux"))
    if given:
        raise ModelError(f"attention of {type(module).__name__} passes {', '.join(given)}, unknown to trees")
    if dropout:
        raise ModelError(NO_DROPOUT)
    window, chunk = mask.reach
    return Rules(scale, window=window, chunk=chunk, softcap=softcap, sinks_H=sinks_H)


def in_one_dtype(attend: Attend, heads: tuple[Tensor, Tensor, Tensor], forest: Forest, rules: Rules) -> Tensor:
    """A backend's attention; under autocast in its dtype, as that of transformers is, forward and backward.

    Rotated queries and keys come in float32 there, values in the lower precision.
    """
    kind = heads[0].device.type
    if not torch.is_autocast_enabled(kind):
        return attend(*heads, forest, rules)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        query, key, value = (head.to(dtype) for head in heads)
        return attend(query, key, value, forest, rules)


def _eager_attention(module: nn.Module):  # type: ignore[no-untyped-def]
    """The eager attention in the module of a model's or a layer's class, None if there is none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
