"""The specification: one (T, T) mask, written as it is defined, for any device and dtype. Slow and obvious.

Shape suffixes: H query heads, K key heads (H is a multiple of K), T tokens, D head size (that of values may differ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from preftree.forest import Forest
from preftree.model.attention.rules import Rules


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """Attention of every token over the tokens that `forest.dense_mask` lets it see; returns (T, H, D)."""
    groups = query_HTD.shape[0] // key_KTD.shape[0]
    key_HTD = key_KTD.repeat_interleave(groups, dim=0)
    value_HTD = value_KTD.repeat_interleave(groups, dim=0)
    accumulate = torch.promote_types(query_HTD.dtype, torch.float32)
    score_HTT = (query_HTD @ key_HTD.transpose(1, 2)).to(accumulate) * rules.scale
    if rules.softcap is not None:
        score_HTT = rules.softcap * torch.tanh(score_HTT / rules.softcap)
    if rules.slopes_H is not None:
        position_T = forest.position_ids_T
        distance_TT = (position_T[:, None] - position_T[None, :]).to(score_HTT.dtype)
        score_HTT = score_HTT - rules.slopes_H.to(score_HTT.dtype)[:, None, None] * distance_TT
    mask_TT = forest.dense_mask(rules.window, rules.chunk)
    score_HTT = score_HTT.masked_fill(~mask_TT, float("-inf"))
    if rules.sinks_H is not None:
        sink_HT1 = rules.sinks_H.to(score_HTT.dtype)[:, None, None].expand(-1, len(forest), 1)
        score_HTT = torch.cat([score_HTT, sink_HT1], dim=-1)
    weight_HTT = torch.softmax(score_HTT, dim=-1)[..., : len(forest)].to(value_HTD.dtype)
    return (weight_HTT @ value_HTD).transpose(0, 1)
