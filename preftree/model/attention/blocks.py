"""Forward-only attention for stretches of a stream: blocks of rows over `[path of the first row ; the block]`.

What a row in a block may see is on the path to the block's first row or in the block itself, so a block takes
part in one GEMM over those keys, however many short options stand in it; only the keys that some of its rows
must not see are masked. Nothing is kept for a backward pass.

Shape suffixes: H query heads, K key heads, G = H / K, T fresh tokens, A known and fresh tokens, D head size,
n rows and m keys of a block, R = G · n stacked rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.forest.stream import Stretch
from preftree.model.attention.rules import Rules

#: Rows of a block. Longer ones waste work above the diagonal, shorter ones make small GEMMs.
BLOCK_ROWS = 128


@dataclass(frozen=True, eq=False)
class Block:
    """Fresh rows `[start, end)`, the keys they see as spans of all tokens, and what is hidden of the last keys."""

    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    hidden: Tensor
    distance_m: Tensor


def plan(stretch: Stretch, window: int | None) -> list[Block]:
    """The blocks of a stretch; `window` as in `Rules`."""
    forest, total = stretch.forest, len(stretch.forest)
    index_A, end_A, position_A = (
        torch.arange(total, device=forest.device),
        forest.subtree_end_T,
        forest.position_ids_T,
    )
    blocks = []
    for start in range(stretch.known, total, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, total)
        seen_m = index_A[:end][end_A[:end] > start]  # a block's own tokens end after its first row, all of them
        row_n1, key_1m = index_A[start:end, None], seen_m[None, :]
        visible_nm = (key_1m <= row_n1) & (row_n1 < end_A[key_1m])
        if window is not None:
            visible_nm &= position_A[row_n1] - position_A[key_1m] < window
            used_m = visible_nm.any(0)
            seen_m, visible_nm = seen_m[used_m], visible_nm[:, used_m]
        everyone = int(visible_nm.all(0).long().cumprod(0).sum())  # leading keys that every row sees
        position_m = position_A[seen_m]
        blocks.append(
            Block(
                start - stretch.known,
                end - stretch.known,
                _spans(seen_m.tolist()),
                ~visible_nm[:, everyone:],
                position_m - position_m[-1],
            )
        )
    return blocks


def _spans(indices: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending indices as half-open spans."""
    spans: list[tuple[int, int]] = []
    for index in indices:
        if spans and spans[-1][1] == index:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    return tuple(spans)


def attend_fresh(query_HTD: Tensor, key_KAD: Tensor, value_KAD: Tensor, stretch: Stretch, rules: Rules) -> Tensor:
    """Attention of the fresh tokens over known and fresh ones, as `dense.attend` defines it; returns (T, H, D)."""
    blocks = stretch.forest.cached(("blocks", rules.window), lambda: plan(stretch, rules.window))
    heads, tokens, size = query_HTD.shape
    key_heads = key_KAD.shape[0]
    query_KGTD = query_HTD.view(key_heads, heads // key_heads, tokens, size) * rules.scale
    out_THD = query_HTD.new_empty(tokens, heads, size)
    for block in blocks:
        rows = block.end - block.start
        query_KRD = query_KGTD[:, :, block.start : block.end].reshape(key_heads, -1, size)
        score_KRm = torch.bmm(query_KRD, _gather(key_KAD, block.spans).transpose(1, 2))
        weight_KRm = _softmax(score_KRm, block, rules).to(value_KAD.dtype)
        out_KRD = torch.bmm(weight_KRm, _gather(value_KAD, block.spans))
        out_THD[block.start : block.end] = out_KRD.view(heads, rows, size).transpose(0, 1)
    return out_THD


def _softmax(score_KRm: Tensor, block: Block, rules: Rules) -> Tensor:
    score_KRm = score_KRm.to(torch.promote_types(score_KRm.dtype, torch.float32))
    if rules.softcap is not None:
        score_KRm = torch.tanh(score_KRm / rules.softcap) * rules.softcap
    rows, masked = block.hidden.shape
    score_KGnm = score_KRm.view(score_KRm.shape[0], -1, rows, score_KRm.shape[2])
    if rules.slopes_H is not None:
        # Softmax ignores what is constant along a row, so the key's position alone is enough.
        slopes_KG11 = rules.slopes_H.to(score_KRm.dtype).view(*score_KGnm.shape[:2], 1, 1)
        score_KGnm += slopes_KG11 * block.distance_m
    score_KGnm[..., score_KGnm.shape[3] - masked :].masked_fill_(block.hidden, float("-inf"))
    return torch.softmax(score_KRm, dim=-1)


def _gather(source_KAD: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [source_KAD[:, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
