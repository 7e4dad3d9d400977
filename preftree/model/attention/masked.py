"""Attention through the device's own fused kernel, with the forest's whole mask passed in: runs on any device.

No shape and no operation depends on what is in the forest, and nothing is read back from the device, so this is the
backend of fixed shapes and of devices that compile for each shape (Gaudi), and the fallback on all others. It costs
the blocks that the mask hides: work and memory grow with T².

Shape suffixes: H query heads, K key heads, T tokens, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from preftree.forest import Forest
from preftree.model.attention import dense
from preftree.model.attention.rules import Rules

#: Dimensions that a sink adds to queries and keys.
_MORE = 8


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """See `dense.attend`, whose values and gradients this matches; returns (T, H, D)."""
    if rules.softcap is not None:  # no fused kernel caps scores
        return dense.attend(query_HTD, key_KTD, value_KTD, forest, rules)
    groups = query_HTD.shape[0] // key_KTD.shape[0]
    key_HTD, value_HTD = (_repeated(x, groups) for x in (key_KTD, value_KTD))
    fused = fused_sdpa(query_HTD.device.type)
    mask = _mask(forest, rules, query_HTD.dtype, as_bias=fused is not None)
    if rules.sinks_H is not None:
        query_HTD, key_HTD, value_HTD, mask = _with_sinks(query_HTD, key_HTD, value_HTD, mask, rules)
    inputs = (query_HTD[None], key_HTD[None], value_HTD[None], mask)
    if fused is not None:
        # No dropout, not causal, the softmax that takes a mask, scores recomputed in the backward pass.
        return fused(*inputs, 0.0, False, rules.scale, "None", True)[0].transpose(0, 1)
    return scaled_dot_product_attention(*inputs, scale=rules.scale)[0].transpose(0, 1)


def _repeated(source_KTD: Tensor, groups: int) -> Tensor:
    """Each key head once for each query head that reads it, (H, T, D)."""
    return source_KTD[:, None].expand(-1, groups, -1, -1).flatten(0, 1) if groups > 1 else source_KTD


def _with_sinks(
    query_HTD: Tensor, key_HTD: Tensor, value_HTD: Tensor, mask: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One more key per head that every query sees, with the sink as its score and zeros as its value.

    The score comes from more dimensions, in which queries are one and other keys zero: two of them hold the sink, since
    one number of bfloat16 would round it, and the rest keep the head size a multiple of what fused kernels want.
    """
    assert rules.sinks_H is not None
    wide_H = rules.sinks_H.to(torch.promote_types(query_HTD.dtype, torch.float32)) / rules.scale
    high_H = wide_H.detach().to(query_HTD.dtype)
    low_H = (wide_H - high_H).to(query_HTD.dtype)
    sink_H1D = torch.stack([high_H, low_H], dim=-1)[:, None]
    query_HTD = torch.cat([query_HTD, torch.ones_like(query_HTD[..., :1]).expand(-1, -1, 2)], dim=-1)
    sink_H1D = pad(sink_H1D, (key_HTD.shape[2], _MORE - 2))
    key_HTD = torch.cat([pad(key_HTD, (0, _MORE)), sink_H1D], dim=1)
    return (
        pad(query_HTD, (0, _MORE - 2)),
        key_HTD,
        pad(value_HTD, (0, 0, 0, 1)),
        pad(mask, (0, 1), value=not mask.is_floating_point()),
    )


def _mask(forest: Forest, rules: Rules, dtype: torch.dtype, as_bias: bool) -> Tensor:
    """The mask of a forest, made once for all layers whose tokens see as far: booleans (T, T), or with ALiBi, or
    where the kernel takes no booleans, what is added to the scores, (1, H or 1, T, T)."""
    if rules.slopes_H is None and not as_bias:
        return forest.cached(("masked", rules.reach), lambda: forest.dense_mask(*rules.reach))
    key = ("masked", rules.reach, dtype, rules.slopes_H)  # a tensor is itself, whatever it holds
    return forest.cached(key, lambda: _as_bias(forest.dense_mask(*rules.reach), forest, rules, dtype))


def _as_bias(mask_TT: Tensor, forest: Forest, rules: Rules, dtype: torch.dtype) -> Tensor:
    bias_1TT = torch.zeros(1, 1, 1, dtype=dtype, device=forest.device)
    if rules.slopes_H is not None:
        position_T = forest.position_ids_T
        distance_TT = position_T[:, None] - position_T[None, :]
        # From the query's own position, so that rounding to 8 bits is smallest where the weight is largest.
        bias_1TT = (-rules.slopes_H[:, None, None] * distance_TT).to(dtype)
    return torch.where(mask_TT, bias_1TT, torch.finfo(dtype).min)[None]


@functools.cache
def fused_sdpa(device: str) -> Callable[..., Tensor] | None:
    """Gaudi's fused attention, None on other devices and where its software does not bring it."""
    if device != "hpu":
        return None
    try:
        from habana_frameworks.torch.hpex.kernels import FusedSDPA
    except ImportError:
        return None
    return FusedSDPA.apply  # type: ignore[no-any-return]
