"""Attention by PyTorch's FlexAttention, compiled from the one-line mask.

The blocks that are hidden or seen entirely are found on the host from the ends of the subtrees alone; no mask of
(T, T) is made. Lengths are rounded up to a few sizes, because the kernel is compiled for them.

Shape suffixes: H query heads, K key heads, T tokens, N tokens rounded up, D head size, Q and K blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from preftree.forest import Forest, upload
from preftree.model.attention.rules import Rules

#: Tokens of a block that is computed or left out as a whole.
BLOCK = 128
#: Compiled variants to keep: lengths x windows x with and without gradients. Dynamo's default of 8 would fall back
#: to an implementation that holds all scores at once.
VARIANTS = 64


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """What the kernel needs of a forest for one window."""

    size: int
    position_N: Tensor
    blocks: BlockMask


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """See `dense.attend`, whose values and gradients this matches; returns (T, H, D)."""
    plan = planned(forest, rules)
    missing = plan.size - len(forest)
    query, key, value = (pad(x, (0, 0, 0, missing))[None] for x in (query_HTD, key_KTD, value_KTD))
    out_1HND, aux = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=_score(rules, plan.position_N),
        block_mask=plan.blocks,
        scale=rules.scale,
        enable_gqa=query_HTD.shape[0] != key_KTD.shape[0],
        return_aux=AuxRequest(lse=rules.sinks_H is not None),
    )
    if rules.sinks_H is not None:  # the part of the softmax's denominator that is not the sink's
        part_1HN = torch.sigmoid(aux.lse - rules.sinks_H.to(aux.lse.dtype)[:, None])
        out_1HND = out_1HND * part_1HN[..., None].to(out_1HND.dtype)
    return out_1HND[0, :, : len(forest)].transpose(0, 1)


@functools.cache
def _kernel(device: str) -> Callable[..., tuple[Tensor, Any]]:
    """Compiled once; on the CPU, where it has no backward pass when compiled, as it is."""
    if device == "cpu":
        return flex_attention  # type: ignore[return-value]
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    return torch.compile(flex_attention)  # type: ignore[return-value]


def _score(rules: Rules, position_N: Tensor) -> Callable[..., Tensor] | None:
    """Softcap and ALiBi as the kernel applies them to one score."""
    cap, slopes_H = rules.softcap, rules.slopes_H
    if cap is None and slopes_H is None:
        return None

    def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if cap is not None:
            value = cap * torch.tanh(value / cap)
        if slopes_H is not None:
            value = value - slopes_H[head] * (position_N[query] - position_N[key])
        return value

    return score


def planned(forest: Forest, rules: Rules) -> FlexPlan:
    """The plan of a forest, made once for all layers whose tokens see as far."""
    return forest.cached(("flex", rules.reach), lambda: _plan(forest, *rules.reach))


def rounded(tokens: int) -> int:
    """The next size that kernels are compiled for: multiples of `BLOCK`, four of them an octave."""
    blocks = max(1, -(-tokens // BLOCK))
    step = max(1, 2 ** (blocks.bit_length() - 3))
    return -(-blocks // step) * step * BLOCK


def _plan(forest: Forest, window: int | None, chunk: int | None) -> FlexPlan:
    size = rounded(len(forest))
    index_N = torch.arange(size)
    end_N = index_N + 1  # what is added sees itself
    end_N[: len(forest)] = torch.repeat_interleave(
        torch.tensor(_subtree_ends(forest)), torch.tensor([s.end - s.start for s in forest.segments])
    )
    partial_QK, full_QK = _kinds_of_blocks(end_N, cut=window is not None or chunk is not None)
    end_on_device = upload(end_N, forest.device)
    partial, full = ([upload(x, forest.device) for x in _listed(chosen_QK)] for chosen_QK in (partial_QK, full_QK))
    position_N = pad(forest.position_ids_T, (0, size - len(forest)))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end_on_device[key])
        if window is not None:
            seen = seen & (position_N[query] - position_N[key] < window)
        if chunk is not None:
            seen = seen & (position_N[query] // chunk == position_N[key] // chunk)
        return seen

    return FlexPlan(
        size,
        position_N,
        BlockMask.from_kv_blocks(partial[0], partial[1], full[0], full[1], BLOCK_SIZE=BLOCK, mask_mod=sees),
    )


def _subtree_ends(forest: Forest) -> list[int]:
    """One past the last token below each segment, from the host's side of the forest."""
    ends = [segment.end for segment in forest.segments]
    for index in range(len(ends) - 1, -1, -1):
        parent = forest.segments[index].parent
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[index])
    return ends


def _kinds_of_blocks(end_N: Tensor, cut: bool) -> tuple[Tensor, Tensor]:
    """Which blocks of queries and keys the mask cuts through, and which are seen entirely, (Q, K) booleans.

    Key k of an earlier block is seen by query q while q < end[k]: some pair is seen if the largest end lies beyond the
    first query, all are if the smallest end lies beyond the last. What windows and chunks `cut` off is left to the
    mask within the block.
    """
    end_KB = end_N.view(-1, BLOCK)
    block_Q1, block_1K = torch.arange(len(end_KB))[:, None], torch.arange(len(end_KB))[None, :]
    some_QK = (block_1K == block_Q1) | ((block_1K < block_Q1) & (end_KB.amax(1) > block_Q1 * BLOCK))
    full_QK = (block_1K < block_Q1) & (end_KB.amin(1) >= (block_Q1 + 1) * BLOCK)
    if cut:
        full_QK = torch.zeros_like(full_QK)
    return some_QK & ~full_QK, full_QK


def _listed(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, as `BlockMask` takes them."""
    order = chosen_QK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return chosen_QK.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]
