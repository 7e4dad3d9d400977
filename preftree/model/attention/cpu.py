"""Attention without padding, made for the CPU: explicit GEMMs over tiles of `[ancestors ; self]`.

Each segment is cut into tiles of query rows. A tile's keys are the segments above it and its own segment up
to the tile's end: a few contiguous spans, no (T, T) mask, no block that is masked entirely. Query heads that
share a key head are stacked into one GEMM, so keys are never repeated. Weights over at most `KEEP_KEYS` keys
are kept for the backward pass; those of longer tiles are recomputed from query and key, so that memory stays
linear in the length.

Shape suffixes: H query heads, K key heads, G = H / K, T tokens, D head size, n rows and m keys of a tile,
R = G · n stacked rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.forest import Forest
from preftree.model.attention.rules import Rules

#: Query rows a tile. Long tiles waste work above the diagonal, short ones make small GEMMs.
TILE_ROWS = 128
#: Keys up to which a tile's weights are kept: heads × KEEP_KEYS numbers a token and layer at most.
KEEP_KEYS = 1024


@dataclass(frozen=True, eq=False)
class Tile:
    """Query rows `[start, end)` and the key spans they may see.

    `hidden` masks forbidden keys among the last `hidden.shape[1]` of the m keys; all others are seen.
    """

    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    hidden: Tensor
    key_position_m: Tensor


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """See `dense.attend`, whose values and gradients this matches; returns (T, H, D)."""
    return _TileAttention.apply(query_HTD, key_KTD, value_KTD, tiles(forest, rules.window), rules)


def tiles(forest: Forest, window: int | None) -> tuple[Tile, ...]:
    """The tiles of a forest, made once for all layers with the same window."""
    return forest.cached(("tiles", window), lambda: tuple(_plan(forest, window)))


def _plan(forest: Forest, window: int | None) -> list[Tile]:
    triangle = torch.ones(TILE_ROWS, TILE_ROWS, dtype=torch.bool, device=forest.device).triu(1)
    plan = []
    for index, segment in enumerate(forest.segments):
        above = [(forest.segments[i].start, forest.segments[i].end) for i in forest.ancestors(index)]
        for start in range(segment.start, segment.end, TILE_ROWS):
            end = min(start + TILE_ROWS, segment.end)
            spans = _joined([*above, (segment.start, end)])
            first, last = (segment.position + row - segment.start for row in (start, end - 1))
            if window is not None:
                spans = _drop_first(spans, first - window + 1)
            keys = torch.cat([torch.arange(a, b, device=forest.device) for a, b in spans])
            position_m = forest.position_ids_T[keys]
            rows = end - start
            hidden = triangle[:rows, :rows]
            if window is not None and last - int(position_m[0]) >= window:
                position_n = forest.position_ids_T[start:end]
                distance_nm = position_n[:, None] - position_m[None, :]
                hidden = (distance_nm >= window) | (distance_nm < 0)
            plan.append(Tile(start, end, tuple(spans), hidden, position_m))
    return plan


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch become one: the first child of a segment follows its parent, and needs no copy."""
    joined = [spans[0]]
    for start, end in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _drop_first(spans: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Spans without the first `count` path positions: no row of the tile reaches that far back."""
    kept = []
    for start, end in spans:
        skip = min(max(count, 0), end - start)
        count -= end - start
        if skip < end - start:
            kept.append((start + skip, end))
    return kept


def _gather(source_KTD: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """The rows of `spans`, (K, m, D): a view when there is one span."""
    parts = [source_KTD[:, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _scatter_add(target_KTD: Tensor, spans: tuple[tuple[int, int], ...], source_KmD: Tensor) -> None:
    offset = 0
    for start, end in spans:
        target_KTD[:, start:end] += source_KmD[:, offset : offset + end - start]
        offset += end - start


def _stack(source_HTD: Tensor, tile: Tile, key_heads: int) -> Tensor:
    """Rows of a tile with the heads of each group stacked, (K, R, D)."""
    return source_HTD[:, tile.start : tile.end].reshape(key_heads, -1, source_HTD.shape[2])


def _weights(query_KRD: Tensor, key_KmD: Tensor, tile: Tile, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """Attention weights (K, R, m) of a tile from its scaled queries, and tanh of the capped scores if capped."""
    # Everything after the GEMM is in float32 at least: in bfloat16 an ALiBi bias loses whole units.
    accumulate = torch.promote_types(query_KRD.dtype, torch.float32)
    score_KRm = torch.bmm(query_KRD, key_KmD.transpose(1, 2)).to(accumulate)
    tanh_KRm = None
    if rules.softcap is not None:
        tanh_KRm = torch.tanh(score_KRm / rules.softcap)
        score_KRm = tanh_KRm * rules.softcap
    rows, keys = tile.hidden.shape
    by_head_KGnm = score_KRm.view(score_KRm.shape[0], -1, rows, score_KRm.shape[2])
    if rules.slopes_H is not None:
        # Softmax ignores what is constant along a row, so the key's position alone is enough. Counting it
        # from the tile's last keeps the numbers small.
        slopes_KG11 = rules.slopes_H.to(score_KRm.dtype).view(*by_head_KGnm.shape[:2], 1, 1)
        by_head_KGnm += slopes_KG11 * (tile.key_position_m - tile.key_position_m[-1]).to(score_KRm.dtype)
    by_head_KGnm[..., by_head_KGnm.shape[3] - keys :].masked_fill_(tile.hidden, float("-inf"))
    return torch.softmax(score_KRm, dim=-1).to(query_KRD.dtype), tanh_KRm


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_HTD, key_KTD, value_KTD, plan: tuple[Tile, ...], rules: Rules):  # type: ignore[no-untyped-def]
        ctx.plan, ctx.rules = plan, rules
        needed, kept = any(ctx.needs_input_grad), []
        heads, tokens, size = query_HTD.shape
        out_THD = query_HTD.new_empty(tokens, heads, size)
        for tile in plan:
            query_KRD = _stack(query_HTD, tile, key_KTD.shape[0]) * rules.scale
            weight_KRm, tanh_KRm = _weights(query_KRD, _gather(key_KTD, tile.spans), tile, rules)
            keep = needed and tanh_KRm is None and weight_KRm.shape[2] <= KEEP_KEYS
            kept.append(weight_KRm if keep else None)
            out_KRD = torch.bmm(weight_KRm, _gather(value_KTD, tile.spans))
            out_THD[tile.start : tile.end] = out_KRD.view(heads, -1, size).transpose(0, 1)
        ctx.save_for_backward(query_HTD, key_KTD, value_KTD, *kept)
        return out_THD

    @staticmethod
    def backward(ctx, grad_THD):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD, *kept = ctx.saved_tensors
        rules, grad_HTD = ctx.rules, grad_THD.transpose(0, 1)
        heads, _, size = query_HTD.shape
        # Gradients in the memory order of the projections that made these tensors: (T, heads, D).
        query_grad_HTD, key_grad_KTD, value_grad_KTD = (
            x.new_zeros(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1) for x in (query_HTD, key_KTD, value_KTD)
        )
        for tile, kept_KRm in zip(ctx.plan, kept, strict=True):
            query_KRD = _stack(query_HTD, tile, key_KTD.shape[0]) * rules.scale
            key_KmD, value_KmD = _gather(key_KTD, tile.spans), _gather(value_KTD, tile.spans)
            grad_KRD = _stack(grad_HTD, tile, key_KTD.shape[0])
            weight_KRm, tanh_KRm = kept_KRm, None
            if kept_KRm is None:
                weight_KRm, tanh_KRm = _weights(query_KRD, key_KmD, tile, rules)
            _scatter_add(value_grad_KTD, tile.spans, torch.bmm(weight_KRm.transpose(1, 2), grad_KRD))
            weight_grad_KRm = torch.bmm(grad_KRD, value_KmD.transpose(1, 2))
            score_grad_KRm = torch.ops.aten._softmax_backward_data(weight_grad_KRm, weight_KRm, -1, weight_KRm.dtype)
            if tanh_KRm is not None:
                score_grad_KRm *= 1 - tanh_KRm * tanh_KRm
            query_grad_KRD = torch.bmm(score_grad_KRm, key_KmD) * rules.scale
            query_grad_HTD[:, tile.start : tile.end] = query_grad_KRD.view(heads, -1, size)
            _scatter_add(key_grad_KTD, tile.spans, torch.bmm(score_grad_KRm.transpose(1, 2), query_KRD))
        return query_grad_HTD, key_grad_KTD, value_grad_KTD, None, None
