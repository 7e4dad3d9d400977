"""Obvious stand-ins for attention kernels that exist on accelerators only, so that what calls them runs on a CPU.

They follow the documentation of PyTorch 2.13 and flash-attn 2.8: `varlen_attn` and `flash_attn_varlen_func` take one
sequence at a time, the mask aligned to the last query and the last key; `flex_attention` takes the blocks it is told.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import AuxOutput

from preftree.model.attention import flex
from preftree.model.attention import varlen as ours


def sequence_attention(
    query_NHD: Tensor,
    key_MKD: Tensor,
    value_MKD: Tensor,
    scale: float,
    left: int,
    softcap: float = 0.0,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of N queries over M keys, whose last ones are the queries' own; (N, H, D)."""
    (queries, heads, _), keys = query_NHD.shape, key_MKD.shape[0]
    groups = heads // key_MKD.shape[1]
    key_MHD, value_MHD = (x.repeat_interleave(groups, dim=1) for x in (key_MKD, value_MKD))
    wide = torch.promote_types(query_NHD.dtype, torch.float32)
    score_HNM = torch.einsum("nhd,mhd->hnm", query_NHD, key_MHD).to(wide) * scale
    if softcap:
        score_HNM = softcap * torch.tanh(score_HNM / softcap)
    distance_NM = (torch.arange(queries) + keys - queries)[:, None] - torch.arange(keys)
    if slopes_H is not None:
        score_HNM = score_HNM - slopes_H.to(wide)[:, None, None] * distance_NM.abs()
    seen_NM = (distance_NM >= 0) & ((distance_NM <= left) if left >= 0 else True)
    weight_HNM = torch.softmax(score_HNM.masked_fill(~seen_NM, float("-inf")), -1).to(query_NHD.dtype)
    return torch.einsum("hnm,mhd->nhd", weight_HNM, value_MHD)


def _by_sequence(query: Tensor, key: Tensor, value: Tensor, places: tuple[Any, ...], *rules: Any) -> Tensor:
    query_start, key_start, most_queries, most_keys = places
    assert query_start.dtype == key_start.dtype == torch.int32
    queries, keys = query_start.diff().tolist(), key_start.diff().tolist()
    assert (max(queries), max(keys)) == (most_queries, most_keys)
    parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    return torch.cat([sequence_attention(q, k, v, *rules) for q, k, v in parts])


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, *places: Any, scale: float, window_size: Any, enable_gqa: bool
) -> Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] == 0
    return _by_sequence(query, key, value, places, scale, window_size[0])


def flash_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *places: Any,
    softmax_scale: float,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    assert causal
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    return _by_sequence(query, key, value, places, softmax_scale, window_size[0], softcap, alibi_slopes)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    return_aux: Any,
) -> tuple[Tensor, Any]:
    """The scores of listed blocks, modified, and masked where the block is not said to be seen entirely."""
    heads, size = query.shape[1:3]
    assert enable_gqa or key.shape[1] == heads
    key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    score_HNN = (query[0] @ key[0].transpose(1, 2)).to(wide) * scale
    head, row, column = torch.arange(heads)[:, None, None], torch.arange(size)[:, None], torch.arange(size)
    if score_mod is not None:
        score_HNN = score_mod(score_HNN, torch.tensor(0), head, row, column)
    seen_NN = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, size)
    seen_NN |= _listed(block_mask.kv_num_blocks, block_mask.kv_indices, size) & block_mask.mask_mod(0, 0, row, column)
    score_HNN = score_HNN.masked_fill(~seen_NN, float("-inf"))
    weight_HNN = torch.softmax(score_HNN, -1)
    return (weight_HNN.to(value.dtype) @ value[0])[None], AuxOutput(lse=score_HNN.logsumexp(-1)[None])


def _listed(count: Tensor, blocks: Tensor, size: int) -> Tensor:
    """The blocks that are listed, as (size, size) booleans."""
    listed_QK = torch.zeros(blocks.shape[2:], dtype=torch.bool)
    for row, many in enumerate(count[0, 0].tolist()):
        listed_QK[row, blocks[0, 0, row, :many].long()] = True
    block = size // len(listed_QK)
    return listed_QK.repeat_interleave(block, 0).repeat_interleave(block, 1)


@contextmanager
def on_cpu() -> Iterator[None]:
    """All backends run on the CPU, with the kernels above."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    with (
        mock.patch.object(ours, "DEVICES", ("cpu",)),
        mock.patch.object(varlen, "varlen_attn", varlen_attn),
        mock.patch.dict(sys.modules, {"flash_attn": package}),
        mock.patch.object(flex, "_kernel", return_value=flex_attention),
    ):
        yield
