"""Attention without padding in explicit GEMMs: tiles of query rows over the keys that they may see.

A tile's keys are a few contiguous spans of tokens, and only the last of them are hidden from some of its rows: there is
no (T, T) mask, and no block that is masked entirely. Query heads that share a key head are stacked into one GEMM, so
keys are never repeated. There are two ways to cut tiles:

    segment_tiles   rows of one segment over `[its ancestors ; itself]`: no work is wasted on other branches
    stretch_tiles   rows of a stretch across its segments, over `[path of the first row ; the tile]`: many short
                    options take part in one GEMM (`attend_fresh`, forward only)

Weights over at most `KEEP_KEYS` keys are kept for the backward pass; those of longer tiles are recomputed from query
and key, so that memory stays linear in the length.

Shape suffixes: H query heads, K key heads, G = H / K, T tokens with queries, A tokens with keys, D head size, n rows
and m keys of a tile, R = G · n stacked rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.forest import Forest, Stretch
from preftree.model.attention.rules import Rules, first_seen

#: Query rows per tile. Longer tiles waste work above the diagonal, shorter ones make small GEMMs.
TILE_ROWS = 128
#: Keys up to which a tile's weights are kept: at most heads × KEEP_KEYS numbers per token and layer.
KEEP_KEYS = 1024

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Tile:
    """Query rows `[start, end)` and the spans of keys that they may see.

    Args:
        hidden: masks forbidden keys among the last `hidden.shape[1]` of the m keys; all others are seen.
        distance_m: path position of each key, counted from the tile's last key so that numbers stay small.
    """

    start: int
    end: int
    spans: Spans
    hidden: Tensor
    distance_m: Tensor


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """See `dense.attend`, whose values and gradients this matches; returns (T, H, D)."""
    tiles = segment_tiles(forest, rules)
    out_THD: Tensor = _TileAttention.apply(query_HTD, key_KTD, value_KTD, rules.sinks_H, tiles, rules)
    return out_THD


def attend_fresh(query_HTD: Tensor, key_KAD: Tensor, value_KAD: Tensor, stretch: Stretch, rules: Rules) -> Tensor:
    """Attention of the fresh tokens over known and fresh ones, as `dense.attend` defines it; returns (T, H, D)."""
    out_THD = query_HTD.new_empty(query_HTD.shape[1], query_HTD.shape[0], value_KAD.shape[2])
    for tile in stretch_tiles(stretch, rules):
        query_KRD = _stack(query_HTD, tile, key_KAD.shape[0]) * rules.scale
        weight_KRm, _ = _weights(query_KRD, _gather(key_KAD, tile.spans), tile, rules)
        _unstack(out_THD, tile, torch.bmm(weight_KRm, _gather(value_KAD, tile.spans)))
    return out_THD


# --- Cutting tiles ---


def segment_tiles(forest: Forest, rules: Rules) -> Sequence[Tile]:
    """The tiles of a forest, cut once for all layers whose tokens see as far."""
    reach = rules.for_forest(forest).reach
    return forest.cached(("segment tiles", reach), lambda: _cut_segments(forest, *reach))


def stretch_tiles(stretch: Stretch, rules: Rules) -> Sequence[Tile]:
    """The tiles of a stretch's fresh tokens, cut once for all layers whose tokens see as far."""
    reach = rules.for_forest(stretch.forest).reach
    return stretch.forest.cached(("stretch tiles", reach), lambda: _cut_stretch(stretch, *reach))


def _cut_segments(forest: Forest, window: int | None, chunk: int | None) -> list[Tile]:
    triangle = torch.ones(TILE_ROWS, TILE_ROWS, dtype=torch.bool, device=forest.device).triu(1)
    tiles = []
    for index, segment in enumerate(forest.segments):
        above = [(forest.segments[i].start, forest.segments[i].end) for i in forest.ancestors(index)]
        for start in range(segment.start, segment.end, TILE_ROWS):
            end = min(start + TILE_ROWS, segment.end)
            spans = _joined([*above, (segment.start, end)])
            position_n = torch.arange(start, end, device=forest.device) + segment.position - segment.start
            first_n = first_seen(position_n, window, chunk)
            spans = _without_first(spans, int(first_n[0]))
            position_m = forest.position_ids_T[torch.cat([torch.arange(a, b, device=forest.device) for a, b in spans])]
            hidden = triangle[: end - start, : end - start]
            if int(first_n[-1]) > int(first_n[0]):
                hidden = (position_m[None, :] < first_n[:, None]) | (position_m[None, :] > position_n[:, None])
            tiles.append(Tile(start, end, tuple(spans), hidden, position_m - position_m[-1]))
    return tiles


def _cut_stretch(stretch: Stretch, window: int | None, chunk: int | None) -> list[Tile]:
    forest, total = stretch.forest, len(stretch.forest)
    index_A = torch.arange(total, device=forest.device)
    end_A, position_A = forest.subtree_end_T, forest.position_ids_T
    tiles = []
    for start in range(stretch.known, total, TILE_ROWS):
        end = min(start + TILE_ROWS, total)
        seen_m = index_A[:end][end_A[:end] > start]  # a tile's own tokens end after its first row, all of them
        row_n1, key_1m = index_A[start:end, None], seen_m[None, :]
        visible_nm = (key_1m <= row_n1) & (row_n1 < end_A[key_1m])
        if window is not None or chunk is not None:
            visible_nm &= position_A[key_1m] >= first_seen(position_A[row_n1], window, chunk)
            used_m = visible_nm.any(0)
            seen_m, visible_nm = seen_m[used_m], visible_nm[:, used_m]
        everyone = int(visible_nm.all(0).long().cumprod(0).sum())  # leading keys that every row sees
        position_m = position_A[seen_m]
        hidden, distance_m = ~visible_nm[:, everyone:], position_m - position_m[-1]
        spans = _joined([(index, index + 1) for index in seen_m.tolist()])
        tiles.append(Tile(start - stretch.known, end - stretch.known, tuple(spans), hidden, distance_m))
    return tiles


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch become one: the first child of a segment follows its parent, and needs no copy."""
    joined = [spans[0]]
    for start, end in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _without_first(spans: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Spans without the first `count` path positions: no row of the tile reaches that far back."""
    kept = []
    for start, end in spans:
        skip = min(max(count, 0), end - start)
        count -= end - start
        if skip < end - start:
            kept.append((start + skip, end))
    return kept


# --- Computing them ---


def _gather(source_KAD: Tensor, spans: Spans) -> Tensor:
    """The rows of `spans`, (K, m, D): a view when there is one span."""
    parts = [source_KAD[:, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _scatter_add(target_KAD: Tensor, spans: Spans, source_KmD: Tensor) -> None:
    offset = 0
    for start, end in spans:
        target_KAD[:, start:end] += source_KmD[:, offset : offset + end - start]
        offset += end - start


def _stack(source_HTD: Tensor, tile: Tile, key_heads: int) -> Tensor:
    """Rows of a tile with the heads of each group stacked, (K, R, D)."""
    return source_HTD[:, tile.start : tile.end].reshape(key_heads, -1, source_HTD.shape[2])


def _unstack(target_THD: Tensor, tile: Tile, source_KRD: Tensor) -> None:
    """The way back, into the rows of a tile."""
    heads, size = target_THD.shape[1:]
    target_THD[tile.start : tile.end] = source_KRD.view(heads, -1, size).transpose(0, 1)


def _weights(query_KRD: Tensor, key_KmD: Tensor, tile: Tile, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """Attention weights (K, R, m) of a tile from its scaled queries, and tanh of the capped scores if capped."""
    # Everything after the GEMM is in float32 at least: in bfloat16 an ALiBi bias loses whole units.
    accumulate = torch.promote_types(query_KRD.dtype, torch.float32)
    score_KRm = torch.bmm(query_KRD, key_KmD.transpose(1, 2)).to(accumulate)
    tanh_KRm = None
    if rules.softcap is not None:
        tanh_KRm = torch.tanh(score_KRm / rules.softcap)
        score_KRm = tanh_KRm * rules.softcap
    rows, masked = tile.hidden.shape
    score_KGnm = score_KRm.view(score_KRm.shape[0], -1, rows, score_KRm.shape[2])
    if rules.slopes_H is not None:
        # Softmax ignores what is constant along a row, so the key's position alone is enough.
        slopes_KG11 = rules.slopes_H.to(score_KRm.dtype).view(*score_KGnm.shape[:2], 1, 1)
        score_KGnm += slopes_KG11 * tile.distance_m.to(score_KRm.dtype)
    score_KGnm[..., score_KGnm.shape[3] - masked :].masked_fill_(tile.hidden, float("-inf"))
    if rules.sinks_H is None:
        return torch.softmax(score_KRm, dim=-1).to(query_KRD.dtype), tanh_KRm
    sinks_KR1 = rules.sinks_H.to(score_KRm.dtype).repeat_interleave(rows).view(*score_KRm.shape[:2], 1)
    weight_KRm = torch.softmax(torch.cat([score_KRm, sinks_KR1], dim=-1), dim=-1)[..., :-1]
    return weight_KRm.to(query_KRD.dtype).contiguous(), tanh_KRm


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_HTD, key_KTD, value_KTD, sinks_H, tiles: Sequence[Tile], rules: Rules):  # type: ignore[no-untyped-def]
        ctx.tiles, ctx.rules = tiles, rules
        needed, kept = any(ctx.needs_input_grad), []
        out_THD = query_HTD.new_empty(query_HTD.shape[1], query_HTD.shape[0], value_KTD.shape[2])
        for tile in tiles:
            query_KRD = _stack(query_HTD, tile, key_KTD.shape[0]) * rules.scale
            weight_KRm, tanh_KRm = _weights(query_KRD, _gather(key_KTD, tile.spans), tile, rules)
            keep = needed and tanh_KRm is None and weight_KRm.shape[2] <= KEEP_KEYS
            kept.append(weight_KRm if keep else None)
            _unstack(out_THD, tile, torch.bmm(weight_KRm, _gather(value_KTD, tile.spans)))
        ctx.save_for_backward(query_HTD, key_KTD, value_KTD, *kept)
        return out_THD

    @staticmethod
    def backward(ctx, grad_THD):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD, *kept = ctx.saved_tensors
        rules, grad_HTD, key_heads = ctx.rules, grad_THD.transpose(0, 1), key_KTD.shape[0]
        # Gradients in the memory order of the projections that made these tensors: (T, heads, D).
        query_grad_THD, key_grad_TKD, value_grad_TKD = (
            x.new_zeros(x.shape[1], x.shape[0], x.shape[2]) for x in (query_HTD, key_KTD, value_KTD)
        )
        key_grad_KTD, value_grad_KTD = key_grad_TKD.transpose(0, 1), value_grad_TKD.transpose(0, 1)
        sinks_grad_H = torch.zeros_like(rules.sinks_H) if ctx.needs_input_grad[3] else None
        for tile, kept_KRm in zip(ctx.tiles, kept, strict=True):
            query_KRD = _stack(query_HTD, tile, key_heads) * rules.scale
            key_KmD, value_KmD = _gather(key_KTD, tile.spans), _gather(value_KTD, tile.spans)
            grad_KRD = _stack(grad_HTD, tile, key_heads)
            weight_KRm, tanh_KRm = kept_KRm, None
            if kept_KRm is None:
                weight_KRm, tanh_KRm = _weights(query_KRD, key_KmD, tile, rules)
            _scatter_add(value_grad_KTD, tile.spans, torch.bmm(weight_KRm.transpose(1, 2), grad_KRD))
            weight_grad_KRm = torch.bmm(grad_KRD, value_KmD.transpose(1, 2))
            if sinks_grad_H is not None:  # a sink's weight is what the keys leave, and the gradient of its weight is 0
                sink_KR = 1 - weight_KRm.to(torch.promote_types(weight_KRm.dtype, torch.float32)).sum(-1)
                along_KR = (weight_KRm * weight_grad_KRm).sum(-1)
                sinks_grad_H -= (sink_KR * along_KR).view(len(sinks_grad_H), -1).sum(-1).to(sinks_grad_H.dtype)
            score_grad_KRm = torch.ops.aten._softmax_backward_data(weight_grad_KRm, weight_KRm, -1, weight_KRm.dtype)
            if tanh_KRm is not None:
                score_grad_KRm *= 1 - tanh_KRm * tanh_KRm
            _unstack(query_grad_THD, tile, torch.bmm(score_grad_KRm, key_KmD) * rules.scale)
            _scatter_add(key_grad_KTD, tile.spans, torch.bmm(score_grad_KRm.transpose(1, 2), query_KRD))
        return query_grad_THD.transpose(0, 1), key_grad_KTD, value_grad_KTD, sinks_grad_H, None, None
