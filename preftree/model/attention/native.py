"""Attention over trees by a kernel of our own, compiled for this machine (`preftree.model.cpu.kernels`).

It keeps a block's weights in the processor's cache and skips all that is masked. Float32 and bfloat16; for other
precisions, windows and softcaps, `tiles.attend` does the same in torch.
"""

from __future__ import annotations

import ctypes

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
    if not can_attend(query_HTD, forest, rules):
        return tiles.attend(query_HTD, key_KTD, value_KTD, forest, rules)
    out_THD: Tensor = _KernelAttention.apply(query_HTD, key_KTD, value_KTD, forest, rules)
    return out_THD


def can_attend(query_HTD: Tensor, forest: Forest, rules: Rules) -> bool:
    """Is this what the kernel computes: no wide numbers, no softcap, no window that hides anything, whole vectors?"""
    plain = rules.softcap is None and query_HTD.dtype in KERNEL_DTYPES and query_HTD.device.type == "cpu"
    if not plain or query_HTD.shape[2] % library().preftree_vector_length():
        return False
    window = rules.window
    return window is None or all(part.position + part.end - part.start <= window for part in forest.segments)


def attend_fresh(query_HTD: Tensor, key_KAD: Tensor, value_KAD: Tensor, stretch: Stretch, rules: Rules) -> Tensor:
    """See `tiles.attend_fresh`, whose values this matches; returns (T, H, D)."""
    forest = stretch.forest
    if not can_attend(query_HTD, forest, rules):
        return tiles.attend_fresh(query_HTD, key_KAD, value_KAD, stretch, rules)
    query_HTD, key_KAD, value_KAD, rules = _rows(query_HTD), _rows(key_KAD), _rows(value_KAD), _readable(rules)
    heads, tokens, size = query_HTD.shape
    known = len(forest) - tokens
    out_THD, total_HA = query_HTD.new_empty(tokens, heads, size), _totals(query_HTD, heads, len(forest))
    query, out = query_HTD.data_ptr(), out_THD.data_ptr()
    # Rows are counted from the first known token, which has neither a query nor an output.
    query -= known * query_HTD.stride(1) * query_HTD.element_size()
    out -= known * heads * size * out_THD.element_size()
    shape = _shape(query_HTD, key_KAD, value_KAD, rules)
    arrays = (query, *addresses(key_KAD, value_KAD), out, *addresses(total_HA))
    narrow = KERNEL_DTYPES[query_HTD.dtype]
    library().preftree_forward(narrow, ctypes.byref(_layout(forest, known)), ctypes.byref(shape), *arrays)
    return out_THD


class _Layout(ctypes.Structure):
    """`Forest` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "segments", "known")),
        *((name, ctypes.c_void_p) for name in ("start", "end", "parent", "position")),
    ]


class _Shape(ctypes.Structure):
    """`Shape` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "size")),
        *((f"{what}_{of}", ctypes.c_int64) for what in ("query", "key", "value") for of in ("token", "head")),
        ("scale", ctypes.c_float),
        ("slopes", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


def _layout(forest: Forest, known: int = 0) -> _Layout:
    """The segments as the kernel reads them; the first `known` tokens are keys only."""
    columns = forest.cached("native", lambda: _columns(forest))
    return _Layout(len(forest), len(forest.segments), known, *(column.data_ptr() for column in columns))


def _columns(forest: Forest) -> Tensor:
    """Start, end, parent and position of each segment, a contiguous row for each."""
    return torch.tensor([(s.start, s.end, s.parent, s.position) for s in forest.segments]).T.contiguous()


def _shape(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, rules: Rules) -> _Shape:
    strides = [stride for x in (query_HTD, key_KTD, value_KTD) for stride in (x.stride(1), x.stride(0))]
    heads, _, size = query_HTD.shape
    slopes = rules.slopes_H.data_ptr() if rules.slopes_H is not None else None
    return _Shape(heads, key_KTD.shape[0], size, *strides, rules.scale, slopes, torch.get_num_threads())


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _totals(query_HTD: Tensor, heads: int, tokens: int) -> Tensor:
    return query_HTD.new_empty(heads, tokens, dtype=torch.float32)


def _readable(rules: Rules) -> Rules:
    """With slopes as the kernel reads them. They must live until it is done."""
    if rules.slopes_H is None:
        return rules
    return Rules(rules.scale, rules.window, rules.softcap, rules.slopes_H.float().contiguous())


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_HTD, key_KTD, value_KTD, forest: Forest, rules: Rules):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD = _rows(query_HTD), _rows(key_KTD), _rows(value_KTD)
        rules = _readable(rules)
        heads, tokens, size = query_HTD.shape
        out_THD, total_HT = query_HTD.new_empty(tokens, heads, size), _totals(query_HTD, heads, tokens)
        shape = _shape(query_HTD, key_KTD, value_KTD, rules)
        arrays = (query_HTD, key_KTD, value_KTD, out_THD, total_HT)
        narrow = KERNEL_DTYPES[query_HTD.dtype]
        library().preftree_forward(narrow, ctypes.byref(_layout(forest)), ctypes.byref(shape), *addresses(*arrays))
        ctx.save_for_backward(*arrays)
        ctx.forest, ctx.rules = forest, rules
        return out_THD

    @staticmethod
    def backward(ctx, grad_THD):  # type: ignore[no-untyped-def]
        query_HTD, key_KTD, value_KTD, out_THD, total_HT = ctx.saved_tensors
        grad_THD = grad_THD.contiguous()
        query_grad_THD = torch.empty_like(out_THD)
        key_grad_TKD, value_grad_TKD = (x.new_empty(x.shape[1], x.shape[0], x.shape[2]) for x in (key_KTD, value_KTD))
        shape = _shape(query_HTD, key_KTD, value_KTD, ctx.rules)
        library().preftree_backward(
            KERNEL_DTYPES[query_HTD.dtype],
            ctypes.byref(_layout(ctx.forest)),
            ctypes.byref(shape),
            *addresses(query_HTD, key_KTD, value_KTD, out_THD, total_HT, grad_THD),
            *addresses(query_grad_THD, key_grad_TKD, value_grad_TKD),
        )
        return *(x.transpose(0, 1) for x in (query_grad_THD, key_grad_TKD, value_grad_TKD)), None, None
