"""Attention over trees by a kernel of our own, compiled for this machine (`preftree.model.cpu.kernels`).

It keeps a block's weights in the processor's cache and skips all that is masked. Float32 and bfloat16; for other
precisions and head sizes, `tiles.attend` does the same in torch.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import torch
from torch import Tensor

from preftree.forest import Forest, Stretch
from preftree.model.attention import tiles
from preftree.model.attention.rules import Rules
from preftree.model.cpu.kernels import KERNEL_DTYPES, addresses, library


def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """See `dense.attend`, whose values and gradients this matches; returns (T, H, D).

    Raises:
        DeviceError: the kernel cannot be compiled or loaded here.
    """
    if not can_attend(query_HTD, value_KTD, rules):
        return tiles.attend(query_HTD, key_KTD, value_KTD, forest, rules)
    out_THD: Tensor = _KernelAttention.apply(query_HTD, key_KTD, value_KTD, rules.sinks_H, forest, rules)
    return out_THD


def can_attend(query_HTD: Tensor, value_KTD: Tensor, rules: Rules) -> bool:
    """Does the kernel compute this: its dtypes, whole vectors, no softcap beside ALiBi (no known model has both)?"""
    if query_HTD.dtype not in KERNEL_DTYPES or query_HTD.device.type != "cpu":
        return False
    vector = library().preftree_vector_length()
    whole = query_HTD.shape[2] % vector == value_KTD.shape[2] % vector == 0
    return bool(whole and (rules.softcap is None or rules.slopes_H is None))


def attend_fresh(query_HTD: Tensor, key_KAD: Tensor, value_KAD: Tensor, stretch: Stretch, rules: Rules) -> Tensor:
    """See `tiles.attend_fresh`, whose values this matches; returns (T, H, D)."""
    forest = stretch.forest
    if not can_attend(query_HTD, value_KAD, rules):
        return tiles.attend_fresh(query_HTD, key_KAD, value_KAD, stretch, rules)
    query_HTD, key_KAD, value_KAD, rules = _rows(query_HTD), _rows(key_KAD), _rows(value_KAD), _readable(rules)
    (heads, tokens, _), known = query_HTD.shape, stretch.known
    shape = _shape(query_HTD, key_KAD, value_KAD, forest, known, rules)
    out_THD = query_HTD.new_empty(tokens, heads, value_KAD.shape[2])
    total_HA = query_HTD.new_empty(heads, len(forest), dtype=torch.float32)
    # Rows are counted from the first known token, which has neither a query nor an output.
    query = query_HTD.data_ptr() - known * query_HTD.stride(1) * query_HTD.element_size()
    out = out_THD.data_ptr() - known * out_THD.stride(0) * out_THD.element_size()
    arrays = (query, *addresses(key_KAD, value_KAD), out, *addresses(total_HA))
    dtype = KERNEL_DTYPES[query_HTD.dtype]
    library().preftree_forward(dtype, ctypes.byref(_layout(forest, known)), ctypes.byref(shape), *arrays)
    return _with_sinks(out_THD, total_HA[:, known:], rules)


class _Layout(ctypes.Structure):
    """`Forest` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "segments", "known")),
        *((name, ctypes.c_void_p) for name in ("start", "end", "parent", "position")),
    ]


class _Shape(ctypes.Structure):
    """`Shape` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "size", "value_size")),
        *((f"{what}_{of}", ctypes.c_int64) for what in ("query", "key", "value") for of in ("token", "head")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("slopes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("window", "chunk", "threads")),
    ]


def _layout(forest: Forest, known: int = 0) -> _Layout:
    """The segments as the kernel reads them; the first `known` tokens are keys only."""
    columns = forest.cached("native", lambda: _columns(forest))
    return _Layout(len(forest), len(forest.segments), known, *(column.data_ptr() for column in columns))


def _columns(forest: Forest) -> Tensor:
    """Start, end, parent and position of each segment, a contiguous row for each."""
    return torch.tensor([(s.start, s.end, s.parent, s.position) for s in forest.segments]).T.contiguous()


def _shape(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, known: int, rules: Rules) -> _Shape:
    """What the kernel reads of its arrays, which it trusts: whatever does not fit is refused here."""
    (heads, tokens, size), (key_heads, _, value_size) = query_HTD.shape, value_KTD.shape
    vector, together = library().preftree_vector_length(), 4 // query_HTD.element_size()
    strides = [stride for x in (query_HTD, key_KTD, value_KTD) for stride in (x.stride(1), x.stride(0))]
    sizes = (heads, tokens, key_heads, size, value_size)
    fits = {
        "one dtype, on the CPU": all(
            x.dtype == query_HTD.dtype and x.device.type == "cpu" for x in (query_HTD, key_KTD, value_KTD)
        ),
        "sizes above 0": min(sizes) > 0 and all(stride >= 0 for stride in strides),
        "a query for each fresh token": tokens == len(forest) - known,
        "a key and a value for each token": key_KTD.shape[1] == value_KTD.shape[1] == len(forest),
        "as many key heads as value heads": key_KTD.shape[0] == key_heads,
        "query heads in groups of one size": heads % max(1, key_heads) == 0,
        "keys as long as queries": key_KTD.shape[2] == size,
        f"head sizes in multiples of {vector}": size % vector == value_size % vector == 0,
        "numbers of a head side by side": all(x.stride(2) == 1 for x in (query_HTD, key_KTD, value_KTD)),
        "whole words between rows": all(stride % together == 0 for stride in strides),
        "one slope and one sink for each head": all(
            x is None or x.shape == (heads,) for x in (rules.slopes_H, rules.sinks_H)
        ),
    }
    if missing := [words for words, true in fits.items() if not true]:
        shapes = ", ".join(f"{tuple(x.shape)} {x.stride()} {x.dtype}" for x in (query_HTD, key_KTD, value_KTD))
        raise ValueError(f"the compiled attention needs {'; '.join(missing)}. Got {shapes} for {len(forest)} tokens.")
    slopes = rules.slopes_H.data_ptr() if rules.slopes_H is not None else None
    numbers = (rules.scale, rules.softcap or 0.0, slopes, rules.window or 0, rules.chunk or 0)
    return _Shape(heads, key_heads, size, value_size, *strides, *numbers, torch.get_num_threads())


def _rows(x: Tensor) -> Tensor:
    """Numbers of a head side by side, and rows a whole number of words apart."""
    together = 4 // x.element_size()
    return x if x.stride(2) == 1 and all(step % together == 0 for step in x.stride()[:2]) else x.contiguous()


def _readable(rules: Rules) -> Rules:
    """With slopes as the kernel reads them. They must live until it is done."""
    if rules.slopes_H is None:
        return rules
    return replace(rules, slopes_H=rules.slopes_H.float().contiguous())


def _with_sinks(out_THD: Tensor, total_HT: Tensor, rules: Rules) -> Tensor:
    """Outputs and, in place, totals with the sinks' part in the softmax's denominator.

    The backward kernel needs nothing more: it forms the weights from the totals, and a sink's value is zero.
    """
    if rules.sinks_H is None:
        return out_THD
    # In float64, whose last bits, which depend on a number's place in a vector, are gone from what is kept.
    sinks_H1 = rules.sinks_H.detach().double()[:, None] * math.log2(math.e)
    with_sinks_HT = torch.logaddexp2(total_HT.double(), sinks_H1)
    part_TH1 = torch.exp2(total_HT - with_sinks_HT).float().T[..., None]
    total_HT.copy_(with_sinks_HT)
    return (out_THD.float() * part_TH1).to(out_THD.dtype)


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_HTD, key_KTD, value_KTD, sinks_H, forest: Forest, rules: Rules):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD = _rows(query_HTD), _rows(key_KTD), _rows(value_KTD)
        rules = _readable(rules)
        shape = _shape(query_HTD, key_KTD, value_KTD, forest, 0, rules)
        heads, tokens, _ = query_HTD.shape
        out_THD = query_HTD.new_empty(tokens, heads, value_KTD.shape[2])
        total_HT = query_HTD.new_empty(heads, tokens, dtype=torch.float32)
        library().preftree_forward(
            KERNEL_DTYPES[query_HTD.dtype],
            ctypes.byref(_layout(forest)),
            ctypes.byref(shape),
            *addresses(query_HTD, key_KTD, value_KTD, out_THD, total_HT),
        )
        out_THD = _with_sinks(out_THD, total_HT, rules)
        ctx.save_for_backward(query_HTD, key_KTD, value_KTD, out_THD, total_HT)
        ctx.forest, ctx.rules = forest, rules
        return out_THD

    @staticmethod
    def backward(ctx, grad_THD):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD, out_THD, total_HT = ctx.saved_tensors
        rules, grad_THD = ctx.rules, grad_THD.contiguous()
        # Gradients in the memory order of the projections that made these tensors: (T, heads, D).
        grads = [x.new_empty(x.shape[1], x.shape[0], x.shape[2]) for x in (query_HTD, key_KTD, value_KTD)]
        shape = _shape(query_HTD, key_KTD, value_KTD, ctx.forest, 0, rules)
        library().preftree_backward(
            KERNEL_DTYPES[query_HTD.dtype],
            ctypes.byref(_layout(ctx.forest)),
            ctypes.byref(shape),
            *addresses(query_HTD, key_KTD, value_KTD, out_THD, total_HT, grad_THD, *grads),
        )
        sinks_grad_H = None
        if ctx.needs_input_grad[3]:
            sink_HT = torch.exp2(rules.sinks_H.float()[:, None] * math.log2(math.e) - total_HT)
            along_HT = (out_THD.float() * grad_THD.float()).sum(-1).T
            sinks_grad_H = -(sink_HT * along_HT).sum(-1).to(rules.sinks_H.dtype)
        return *(x.transpose(0, 1) for x in grads), sinks_grad_H, None, None
