"""Products with frozen weights in float32 on a CPU, by whichever of torch's two libraries is faster here.

torch takes MKL for float32 matrices. On processors that MKL does not know it uses no more than AVX2 there, while
oneDNN, which torch carries too, uses all that the processor has: 2.3 times the speed on an AMD EPYC with AVX-512.
oneDNN's product is an operation of torch's compiler (`mkldnn._linear_pointwise`) without a public name, so it is looked
up, compared and timed once, and MKL stays wherever any of that fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Rows and width of the products that are compared: as a forest of a small model has them.
_SAMPLE = (1024, 512)
#: A gain below this is within what timings differ by themselves.
_WORTH = 1.2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, I), weight (O, I), bias (O,) or None to (…, O), as `torch.nn.functional.linear`, without gradients."""
    if x.device.type == "cpu" and pays(x.dtype):
        return _onednn(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def frozen(module: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer without trained weights computes, differentiable in x."""
    out: Tensor = _FrozenLinear.apply(x, module.weight, module.bias)
    return out


def pays(dtype: torch.dtype) -> bool:
    """Does `linear` do better than torch by itself?"""
    return dtype == torch.float32 and faster() > _WORTH


@lru_cache(maxsize=1)
def faster() -> float:
    """How many times as fast as MKL's product oneDNN's is here; 0 where there is none or its values differ."""
    rows, width = _SAMPLE
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, width, generator=random) for count in (rows, width))
    try:
        with torch.no_grad():
            if not torch.allclose(_onednn(x, weight, None), x @ weight.T, rtol=1e-4, atol=1e-3):
                return 0.0
            return _seconds(lambda: x @ weight.T) / _seconds(lambda: _onednn(x, weight, None))
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or with another signature
        return 0.0


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _seconds(product: Callable[[], Any]) -> float:
    """The shortest of a few runs; other work on the machine only ever adds."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.T), None, None
