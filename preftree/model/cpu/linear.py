"""Products with weights on a CPU, by whichever of torch's libraries is faster here.

torch carries oneDNN beside MKL. For float32 it takes MKL, which uses no more than AVX2 on processors of other makers
than Intel: oneDNN is 1.1 to 3 times as fast on an AMD EPYC with AVX-512 (Zen 4, Zen 5). And oneDNN's own order of a
weight saves it from sorting that weight again in every product: `pack` keeps a frozen weight in that order, once for
x Wᵀ and, in bfloat16 as soon as there is a backward pass, once for g W. Float32 products take a weight for g W as it
lies. Packed products are as fast for any number of rows; others lose up to a fifth where rows are no multiple of 16,
and half and more where they are few.

Both are operations of torch's compiler (`torch.ops.mkldnn`) without a public name, so they are looked up and compared
once, and torch's own product stays wherever they are missing or differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from preftree.io.processor import cpuinfo

#: Numbers of a weight by which a write that left no other trace is noticed.
_WITNESSES = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, I), weight (O, I), bias (O,) or None to (…, O), as `torch.nn.functional.linear`, without gradients."""
    if (pack := packed(weight)) is not None:
        return _onednn(x, pack.forward, bias)
    if x.device.type == "cpu" and is_faster(x.dtype):
        return _onednn(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient with respect to x of `linear`: grad (…, O) and weight (O, I) to (…, I)."""
    if packs_backward(weight.dtype) and (pack := packed(weight)) is not None:
        if pack.backward is None:
            pack.backward = _reorder(weight.detach().t().contiguous())
        return _onednn(grad, pack.backward, None)
    return linear(grad, weight.T)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient with respect to the weight of `linear`: grad (…, O) and x (…, I) to (O, I)."""
    return linear(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)


def frozen(module: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer without trained weights computes, differentiable in x."""
    out: Tensor = _FrozenLinear.apply(x, module.weight, module.bias)
    return out


def trained(module: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer computes, differentiable in x, weight and bias; itself where x has another dtype."""
    if x.dtype != module.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return nn.functional.linear(x, module.weight, module.bias)
    out: Tensor = _TrainedLinear.apply(x, module.weight, module.bias)
    return out


@dataclass(eq=False)
class Pack:
    """A weight (O, I) in oneDNN's order: `forward` for x Wᵀ; `backward` for g W, None until one is needed."""

    forward: Tensor
    backward: Tensor | None
    version: int
    witnesses: Tensor

    def of(self, weight: Tensor) -> bool:
        """Is the weight still what was packed? Adapters are merged through `.data`, which moves no version."""
        alike = self.witnesses.dtype == weight.dtype and self.witnesses.device == weight.device
        return alike and self.version == weight._version and torch.equal(self.witnesses, _witnesses(weight))


_packs = WeakTensorKeyDictionary()


def pack(weight: Tensor) -> bool:
    """Keep a frozen weight (O, I) in oneDNN's order as well, as long as it lives; returns whether that is possible."""
    unpack(weight)
    plain = not isinstance(weight, DTensor) and weight.device.type == "cpu" and weight.dim() == 2
    if not plain or not weight.is_contiguous() or not packs(weight.dtype):
        return False
    own = weight.detach()
    _packs[weight] = Pack(_reorder(own), None, weight._version, _witnesses(own).clone())
    return True


def packed(weight: Tensor) -> Pack | None:
    """What `pack` keeps of a weight; None, and forgotten, if the weight has changed since."""
    found: Pack | None = _packs.get(weight)
    if found is not None and not found.of(weight):
        del _packs[weight]
        return None
    return found


def unpack(weight: Tensor) -> None:
    """Forget what `pack` keeps of a weight."""
    _packs.pop(weight, None)


def packs_backward(dtype: torch.dtype) -> bool:
    """Does a backward pass keep a packed weight in a second order? float32 would gain nothing by it."""
    return dtype == torch.bfloat16


def promised_bytes(model: nn.Module) -> int:
    """What a model's packed weights will take beyond what they take now, once a backward pass went through them all."""
    packs = (packed(parameter) for parameter in model.parameters() if packs_backward(parameter.dtype))
    return sum(each.forward.nbytes for each in packs if each is not None and each.backward is None)


def product_with(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x to x Wᵀ by the fastest way there is, for a weight (O, I) of the caller's."""
    pack(weight)
    return lambda x: linear(x, weight)


def is_faster(dtype: torch.dtype) -> bool:
    """Does oneDNN do better than torch by itself with a weight that is not packed?"""
    return dtype == torch.float32 and mkl_is_held_back() and packs(dtype)


@lru_cache(maxsize=1)
def mkl_is_held_back() -> bool:
    """Does MKL, whose float32 product torch takes, leave this processor's AVX-512 unused?

    No clock decides: ranks and resumed runs must compute alike.
    """
    known = cpuinfo().get("vendor_id", "GenuineIntel") == "GenuineIntel"
    return not known and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@lru_cache(maxsize=2)
def packs(dtype: torch.dtype) -> bool:
    """Are oneDNN's products of this dtype right here, all that are used: plain and packed, forward and backward?"""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    random = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=random).to(dtype) for shape in ((37, 96), (160, 96), (37, 160)))
    rtol, atol = (2e-2, 0.2) if dtype == torch.bfloat16 else (1e-4, 1e-3)
    try:
        with torch.no_grad():
            found = [
                (_onednn(x, weight, None), x @ weight.T),
                (_onednn(x, _reorder(weight), None), x @ weight.T),
            ]
            if packs_backward(dtype):
                found += [(_onednn(grad, _reorder(weight.t().contiguous()), None), grad @ weight)]
            else:  # gradients of input and weight take both as they lie
                found += [(_onednn(grad, weight.T, None), grad @ weight), (_onednn(grad.T, x.T, None), grad.T @ x)]
            return all(torch.allclose(ours, theirs, rtol=rtol, atol=atol) for ours, theirs in found)
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or a processor without its instructions
        return False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _reorder(weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # None: for any number of rows
    return out


def _witnesses(weight: Tensor) -> Tensor:
    flat = weight.detach().view(-1)
    return flat[:: max(1, len(flat) // _WITNESSES)]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        return input_gradient(grad, weight), None, None


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            input_gradient(grad, weight) if of_x else None,
            weight_gradient(grad, x) if of_weight else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None,
        )
