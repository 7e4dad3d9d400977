"""Attention by variable-length flash attention: one causal sequence a chain of segments, its path as keys.

A chain is a segment followed by its first child, that child's first child, and so on: their tokens are adjacent, so
they are the queries of one sequence, whose keys are the chain's ancestors and the chain itself. With
the mask aligned to the last query and key, causality and the sliding window are those of the path. Keys and values of
shared prompts are gathered once for each chain below them.

The kernel is `torch.nn.attention.varlen`, or the flash-attn package where that one lacks something (ALiBi, softcap).

Shape suffixes: H query heads, K key heads, T tokens, M gathered keys, D head size, N chains.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from preftree.forest import Forest, upload
from preftree.model.attention.rules import Rules

#: Devices that have such a kernel.
DEVICES = ("cuda",)


@dataclass(frozen=True, eq=False)
class Chains:
    """Where chains begin among queries and keys, the longest of each, and the token behind each gathered key."""

    query_start_N1: Tensor  # int32, as the kernels take it
    key_start_N1: Tensor
    most_queries: int
    most_keys: int
    token_M: Tensor


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """See `dense.attend`, whose values and gradients this matches; returns (T, H, D).

    Raises NotImplementedError where no kernel here can do it.
    """
    rules = rules.for_forest(forest)
    kernel = _kernel(query_HTD.device.type, rules)
    plan, size = chains(forest), max(query_HTD.shape[2], value_KTD.shape[2])
    # The kernels take one head size: zeros behind a shorter one change neither products nor sums.
    query_THD, key_TKD, value_TKD = (
        pad(x.transpose(0, 1), (0, size - x.shape[2])) for x in (query_HTD, key_KTD, value_KTD)
    )
    key_MKD, value_MKD = (x.index_select(0, plan.token_M) for x in (key_TKD, value_TKD))
    return kernel(query_THD, key_MKD, value_MKD, plan, rules)[..., : value_KTD.shape[2]]


def chains(forest: Forest) -> Chains:
    """The chains of a forest, made once for all layers."""
    return forest.cached("varlen", lambda: _find_chains(forest))


def _find_chains(forest: Forest) -> Chains:
    starts: list[int] = []  # of a chain's queries
    paths: list[list[tuple[int, int]]] = []  # the spans above a chain
    for index, segment in enumerate(forest.segments):
        if index and segment.parent == index - 1:
            continue  # goes on with the chain
        starts.append(segment.start)
        paths.append([(above.start, above.end) for above in forest.path_segments(index)[:-1]])
    spans = [
        [*path, span] for path, span in zip(paths, zip(starts, [*starts[1:], len(forest)], strict=True), strict=True)
    ]
    queries = [path[-1][1] - path[-1][0] for path in spans]
    keys = [sum(end - start for start, end in path) for path in spans]
    tokens = [torch.arange(start, end) for path in spans for start, end in path]
    edges = torch.tensor([[0, *queries], [0, *keys]]).cumsum(1).flatten()
    places, token_M = upload(torch.cat([edges, *tokens]), forest.device).split([len(edges), sum(keys)])
    query_start_N1, key_start_N1 = places.to(torch.int32).view(2, -1)
    return Chains(query_start_N1, key_start_N1, max(queries), max(keys), token_M)


Kernel = Callable[[Tensor, Tensor, Tensor, Chains, Rules], Tensor]


def _kernel(device: str, rules: Rules) -> Kernel:
    if device not in DEVICES:
        raise NotImplementedError(f"no variable-length attention on {device}")
    if rules.sinks_H is not None or rules.chunk is not None:
        raise NotImplementedError("variable-length attention has no attention sinks and no chunks")
    refused = []
    for kernel in (_torch, _flash_attn):
        try:
            return kernel(rules)
        except (ImportError, NotImplementedError) as reason:
            refused.append(str(reason))
    raise NotImplementedError("; ".join(refused))


def _torch(rules: Rules) -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    if rules.slopes_H is not None or rules.softcap is not None:
        raise NotImplementedError("torch's variable-length attention has no ALiBi and no softcap")
    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not yet in PyTorch 2.11

    def kernel(query_THD: Tensor, key_MKD: Tensor, value_MKD: Tensor, plan: Chains, rules: Rules) -> Tensor:
        groups = query_THD.shape[1] // key_MKD.shape[1]
        if groups > 1 and not takes_groups:
            key_MKD, value_MKD = (x.repeat_interleave(groups, dim=1) for x in (key_MKD, value_MKD))
        grouped: dict[str, Any] = {"enable_gqa": groups > 1} if takes_groups else {}
        out = varlen_attn(
            query_THD,
            key_MKD,
            value_MKD,
            plan.query_start_N1,
            plan.key_start_N1,
            plan.most_queries,
            plan.most_keys,
            scale=rules.scale,
            window_size=_window(rules),
            **grouped,
        )
        assert isinstance(out, Tensor)
        return out

    return kernel


def _flash_attn(rules: Rules) -> Kernel:
    from flash_attn import flash_attn_varlen_func

    def kernel(query_THD: Tensor, key_MKD: Tensor, value_MKD: Tensor, plan: Chains, rules: Rules) -> Tensor:
        slopes_H = rules.slopes_H
        return flash_attn_varlen_func(  # type: ignore[no-any-return]
            query_THD,
            key_MKD,
            value_MKD,
            plan.query_start_N1,
            plan.key_start_N1,
            plan.most_queries,
            plan.most_keys,
            softmax_scale=rules.scale,
            causal=True,
            window_size=_window(rules),
            softcap=rules.softcap or 0.0,
            alibi_slopes=None if slopes_H is None else slopes_H.float(),
        )

    return kernel


def _window(rules: Rules) -> tuple[int, int]:
    """Keys to the left of a query's own and to the right of it; -1 is all."""
    return (-1 if rules.window is None else rules.window - 1, 0)
