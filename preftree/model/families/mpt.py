"""MPT (mosaicml): ALiBi, one fused `Wqkv`, and no attention interface.

Stock MPT biases scores by the key's index in the batch, which in a forest is not its distance. Here the
blocks run as they are, with the forest handed down where the ALiBi tensor goes, and the attention module
computes the bias from path positions.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.model.attention import Attend, Rules
from preftree.model.families import interface
from preftree.model.families.mask import NO_DROPOUT
from preftree.model.patch import Patches


@dataclass(frozen=True, eq=False)
class _Passenger:
    """What travels down in place of the ALiBi tensor."""

    forest: Forest
    attend: Attend
    slopes_H: Tensor


def prepare(model: PreTrainedModel, patches: Patches):  # type: ignore[no-untyped-def]
    """See `families.prepare`."""
    transformer: Any = model.base_model
    for block in transformer.blocks:
        patches.forward(block.attn, types.MethodType(_attention, block.attn))

    def body(forest: Forest, attend: Attend) -> Tensor:
        slopes_H = forest.cached(("mpt", transformer.num_heads), lambda: _slopes(transformer.num_heads, forest.device))
        passenger = _Passenger(forest, attend, slopes_H)
        hidden = transformer.wte(forest.input_ids_T[None])
        for block in transformer.blocks:
            hidden = block(hidden, position_bias=passenger, attention_mask=None)[0]
        return transformer.norm_f(hidden)[0]

    return body


def _slopes(heads: int, device: torch.device) -> Tensor:
    """At distance 1 the stock bias is −slope, whatever the heads' number and interpolation."""
    alibi_H12: Tensor = build_mpt_alibi_tensor(heads, 2, device=device)
    return -alibi_H12[:, 0, 0]


def _attention(self: Any, hidden_states: Tensor, position_bias=None, *args, **kwargs):  # type: ignore[no-untyped-def]
    """`MptAttention.forward` that knows forests; anything else goes to the stock code."""
    if not isinstance(position_bias, _Passenger):
        return type(self).forward(self, hidden_states, position_bias, *args, **kwargs)
    if self.training and self.attn_dropout_p:
        raise ModelError(NO_DROPOUT)
    mixed = self.Wqkv(hidden_states[0])
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query_HTD, key_HTD, value_HTD = (
        part.view(part.shape[0], self.n_heads, self.head_dim).transpose(0, 1) for part in mixed.chunk(3, dim=1)
    )
    rules = Rules(scale=self.softmax_scale, slopes_H=position_bias.slopes_H)
    heads = (query_HTD, key_HTD, value_HTD)
    out_THD = interface.in_one_dtype(position_bias.attend, heads, position_bias.forest, rules)
    return self.out_proj(out_THD.reshape(1, *mixed.shape[:1], -1)), None
