"""Norms and gated activations in one pass over memory, on the CPU in float32 or bfloat16; faster products.

A model's own modules stay as they are; those that a kernel can replace get another `forward`, after both have
been compared on random rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from preftree.model.cpu import linear
from preftree.model.cpu.kernels import KERNEL_DTYPES, addresses, library
from preftree.model.patch import Patches

Forward = Callable[[Any, Tensor], Tensor]
#: Share of the memory there is that weights in other orders may take.
PACKED_SHARE = 1 / 8


def pack_weights(model: nn.Module, patches: Patches, room: int) -> str:
    """Keep frozen linear weights in the layout of the CPU's matrix products as well, if memory allows; the reason.

    Args:
        room: bytes that are free, of which copies may take `PACKED_SHARE`.
    """
    layers = [each for each in model.modules() if type(each) is nn.Linear and _frozen(each)]
    weights = list({id(each.weight): each.weight for each in layers if each.weight.dtype in KERNEL_DTYPES}.values())
    copies = sum((1 + linear.packs_backward(weight.dtype)) * weight.nbytes for weight in weights)
    if copies > PACKED_SHARE * room:
        return f"weights in one order: copies would take {copies / 2**30:.2f} of {max(room, 0) / 2**30:.2f} GiB"
    packed = [weight for weight in weights if linear.pack(weight)]
    for weight in packed:
        patches.on_undo(partial(linear.unpack, weight))
    return f"{len(packed)} weights also in the order of oneDNN's products ({copies / 2**30:.2f} GiB)" if packed else ""


def fuse(model: nn.Module, patches: Patches) -> int:
    """Put the kernels in wherever they give what the module gives; returns in how many modules.

    Raises:
        DeviceError: the kernels cannot be compiled here.
    """
    vector = library().preftree_vector_length()
    # A layer under an adapter is called for itself only where the adapter was merged into its weight.
    adapted = {id(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    fused = 0
    for module in model.modules():
        found = None if id(module) in adapted else _kernel(module, vector)
        if found is not None and _agrees(module, *found):
            patches.forward(module, partial(found[0], module))
            fused += 1
    return fused


def _frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _kernel(module: nn.Module, vector: int) -> tuple[Forward, int] | None:
    """The forward that may replace a module's, and the width of its input."""
    weight = getattr(module, "weight", None)
    if _dtype(module) not in KERNEL_DTYPES:
        return None
    if type(module) is nn.Linear:
        faster = linear.packed(module.weight) is not None or linear.is_faster(module.weight.dtype)
        return (linear.frozen if _frozen(module) else linear.trained, module.in_features) if faster else None
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and _epsilon(module) is not None:
        return (_rms_norm, weight.shape[0]) if weight.dim() == 1 and weight.shape[0] % vector == 0 else None
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(part, nn.Module) for part in parts) and hasattr(module, "act_fn"):
        width, inner = (getattr(parts[0], name, None) for name in ("in_features", "out_features"))
        return (_gated, int(width)) if width and inner and inner % vector == 0 else None
    return None


def _agrees(module: nn.Module, forward: Forward, width: int) -> bool:
    """Is `forward` what the module computes? Rounding apart: another activation or offset shows in the first digits."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(_dtype(module))
    noise = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
    try:
        with torch.no_grad():
            expected, found = module.forward(x[None]), forward(module, x[None])
    except Exception:  # a module that only shares a name may want anything else
        return False
    return bool(torch.allclose(found, expected, rtol=10 * noise, atol=noise * float(expected.abs().max())))


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters()), None)


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, float) else None


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype:  # under autocast
        stock: Tensor = type(module).forward(module, x)
        return stock
    out: Tensor = _RmsNorm.apply(x, module.weight, _epsilon(module))
    return out


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    trained = type(down) is nn.Linear and down.weight.requires_grad and down.bias is None
    out: Tensor
    if trained and gate.dtype == down.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        out = _SwigluLinear.apply(gate, up, down.weight)
    else:
        out = down(_Swiglu.apply(gate, up))
    return out


class _RmsNorm(torch.autograd.Function):
    """x (…, D) and a weight (D,) to weight · x / rms(x); arXiv 1910.07467."""

    #: Rows whose part of the weight's gradient is added up by itself.
    GROUP = 64

    @staticmethod
    def forward(ctx, x, weight, epsilon: float):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        size, rows = x.shape[-1], x.numel() // x.shape[-1]
        out, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        library().preftree_rms(
            KERNEL_DTYPES[x.dtype], rows, size, torch.get_num_threads(), epsilon, *addresses(x, weight, out, scale)
        )
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        size, rows = x.shape[-1], x.numel() // x.shape[-1]
        x_grad, sums = torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            sums = x.new_empty(-(-rows // _RmsNorm.GROUP), size, dtype=torch.float32)
        library().preftree_rms_backward(
            KERNEL_DTYPES[x.dtype],
            rows,
            size,
            _RmsNorm.GROUP,
            torch.get_num_threads(),
            *addresses(x, weight, scale, grad, x_grad),
            None if sums is None else sums.data_ptr(),
        )
        return x_grad, None if sums is None else sums.sum(0).to(weight.dtype), None


class _Swiglu(torch.autograd.Function):
    """silu(gate) · up, of one shape (…, I); arXiv 2002.05202. Keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        return _swiglu_gradients(gate, up, grad)


class _SwigluLinear(torch.autograd.Function):
    """(silu(gate) · up) Wᵀ with a trained weight (O, I).

    What W multiplies is computed again in the backward pass: kept, it would be a fifth of a layer's activations.
    """

    @staticmethod
    def forward(ctx, gate, up, weight):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, weight)
        return linear.linear(_swiglu(gate, up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up, weight = ctx.saved_tensors
        weight_grad = linear.weight_gradient(grad, _swiglu(gate, up)) if ctx.needs_input_grad[2] else None
        return *_swiglu_gradients(gate, up, linear.input_gradient(grad, weight)), weight_grad


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    library().preftree_swiglu(
        KERNEL_DTYPES[gate.dtype], gate.numel(), torch.get_num_threads(), *addresses(gate, up, out)
    )
    return out


def _swiglu_gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    library().preftree_swiglu_backward(
        KERNEL_DTYPES[gate.dtype],
        gate.numel(),
        torch.get_num_threads(),
        *addresses(gate, up, grad, gate_grad, up_grad),
    )
    return gate_grad, up_grad
