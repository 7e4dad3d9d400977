"""BLOOM: ALiBi added inside an attention of its own.

Stock BLOOM biases scores by the key's index, which in a forest is not its position. Here its attention module, handed
a `ForestMask` where it expects a mask of four dimensions, gives the slopes to our backends instead.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes, dropout_add

from preftree.errors import ModelError
from preftree.model.attention import Rules
from preftree.model.families.interface import in_one_dtype, mask_body
from preftree.model.families.mask import NO_DROPOUT, ForestMask
from preftree.model.patch import Patches


def prepare(model: PreTrainedModel, patches: Patches):  # type: ignore[no-untyped-def]
    """See `families.prepare`."""
    transformer: Any = model.base_model
    patches.method(transformer, "build_alibi_tensor", types.MethodType(_build_alibi_tensor, transformer))
    for block in transformer.h:
        patches.forward(block.self_attention, types.MethodType(_attention, block.self_attention))
    return mask_body(model)


def _build_alibi_tensor(self: Any, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """`BloomModel.build_alibi_tensor`; nothing for a forest, whose slopes `_attention` knows."""
    if isinstance(attention_mask, ForestMask):
        return torch.empty(0)
    return type(self).build_alibi_tensor(self, attention_mask, num_heads, dtype)  # type: ignore[no-any-return]


def _attention(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`BloomAttention.forward` that knows forests; anything else goes to the stock code."""
    if not isinstance(attention_mask, ForestMask):
        stock: tuple[Tensor, Tensor | None] = type(self).forward(
            self, hidden_states, residual, alibi, attention_mask, **options
        )
        return stock
    if self.training and self.attention_dropout.p:
        raise ModelError(NO_DROPOUT)
    forest = attention_mask.forest
    slopes_H = forest.cached(("bloom", self.num_heads), lambda: _get_alibi_slopes(self.num_heads, forest.device))
    rules = Rules(scale=self.inv_norm_factor, slopes_H=slopes_H)
    query, key, value = (heads[0] for heads in self._reshape(self.query_key_value(hidden_states)))
    out_THD = in_one_dtype(attention_mask.attend, (query, key, value), forest, rules)
    output = self.dense(out_THD.reshape(1, len(forest), -1))
    return dropout_add(output, residual, self.hidden_dropout, self.training), None
