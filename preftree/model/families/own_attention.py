"""Models that compute attention themselves, past transformers' attention interface, at one of two places.

    _attn    a method of the attention module, (query, key, value, attention_mask) → outputs (GPT-J, GPT-Neo, CodeGen)
    sdpa     `torch.nn.functional.scaled_dot_product_attention`, called with the mask as it is (Falcon with rotary
             positions)

Both are handed a `ForestMask` where they expect a mask of four dimensions, which transformers passes on untouched.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from preftree.errors import ModelError
from preftree.model.attention import Rules
from preftree.model.families.interface import in_one_dtype, mask_body, set_attention
from preftree.model.families.mask import ForestMask
from preftree.model.patch import Patches


def prepare_attn(model: PreTrainedModel, patches: Patches):  # type: ignore[no-untyped-def]
    """See `families.prepare`, for models whose attention is a method `_attn`."""
    for module in model.modules():
        if hasattr(module, "_attn"):
            patches.method(module, "_attn", types.MethodType(_attn, module))
    return mask_body(model)


def prepare_sdpa(model: PreTrainedModel, patches: Patches):  # type: ignore[no-untyped-def]
    """See `families.prepare`, for models that call torch's attention with their mask (see `ForestMask`)."""
    if getattr(model.config, "alibi", False):
        raise ModelError("it adds ALiBi to its mask inside an attention of its own, where trees cannot reach it")
    set_attention(model, "sdpa", patches)
    return mask_body(model)


def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
    """A stock `_attn` that knows forests: query, key and value (1, H, T, D) to outputs of that shape."""
    if not isinstance(attention_mask, ForestMask):
        return type(self)._attn(self, query, key, value, attention_mask)
    local = getattr(self, "attention_type", "global") == "local"
    rules = Rules(
        scale=1 / float(getattr(self, "scale_attn", 1.0)),
        window=self.config.window_size if local else None,
    )
    heads = (query[0].to(value.dtype), key[0].to(value.dtype), value[0])
    out_THD = in_one_dtype(attention_mask.attend, heads, attention_mask.forest, rules)
    return out_THD.transpose(0, 1)[None], None
