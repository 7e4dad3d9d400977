"""PEFT's LoRA layer with less work around its two small products: x Wᵀ + s · (x Aᵀ) Bᵀ.

PEFT's own forward makes the update, scales it and adds it, a pass over memory each, and computes it in the adapter's
float32 when the model is in bfloat16. Here the update is added by the product that makes it, in the model's dtype,
from float32 masters; the gradients go the same way. Layers, names and files stay PEFT's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from preftree.model.cpu.linear import frozen, input_gradient, linear
from preftree.model.patch import Patches


def patch_lora(model: nn.Module, patches: Patches) -> int:
    """Give every plain LoRA layer over a linear layer the short forward; returns how many there are."""
    adapted: list[Any] = [module for module in model.modules() if type(module) is LoraLayer]
    layers = [layer for layer in adapted if type(layer.get_base_layer()) is nn.Linear]
    for layer in layers:
        patches.forward(layer, partial(_forward, layer))
    return len(layers)


def _forward(layer: Any, x: Tensor, *others: Any, **more: Any) -> Tensor:
    """`LoraLayer.forward`, and that itself wherever more than one plain adapter is asked for, and under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return _stock(layer, x, *others, **more)
    base = layer.get_base_layer()
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    trained_base = any(parameter.requires_grad for parameter in base.parameters())
    if layer.disable_adapters and not (layer.merged or others or more or trained_base):
        return frozen(base, x)
    if layer.disable_adapters or layer.merged or others or more or len(active) != 1:
        return _stock(layer, x, *others, **more)
    (name,) = active
    dropout, down, up = layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
    dropping = layer.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
    if dropping or trained_base or name in layer.lora_variant or down.bias is not None or up.bias is not None:
        return _stock(layer, x)
    # Rows in, rows out: a view made inside the Function could not be modified in place, as some models do.
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _LoraLinear.apply(rows, base.weight, base.bias, down.weight, up.weight, layer.scaling[name])
    return out.view(*x.shape[:-1], -1)


def _stock(layer: Any, x: Tensor, *others: Any, **more: Any) -> Tensor:
    out: Tensor = LoraLayer.forward(layer, x, *others, **more)
    return out


class _LoraLinear(torch.autograd.Function):
    """Rows (N, I), weight (O, I) and bias frozen, down (r, I), up (O, r) to (N, O)."""

    @staticmethod
    def forward(ctx, rows, weight, bias, down, up, scaling: float):  # type: ignore[no-untyped-def]
        down_c, up_c = down.to(rows.dtype), up.to(rows.dtype)
        out = linear(rows, weight, bias)
        low = rows @ down_c.T
        out.addmm_(low, up_c.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, down_c, up_c)
        ctx.scaling, ctx.dtype = scaling, down.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, low, weight, down_c, up_c = ctx.saved_tensors
        grad = grad.contiguous()
        low_grad = (grad @ up_c).mul_(ctx.scaling)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = input_gradient(grad, weight).addmm_(low_grad, down_c)
        down_grad = (low_grad.T @ rows).to(ctx.dtype)
        up_grad = (grad.T @ low).mul_(ctx.scaling).to(ctx.dtype)
        return x_grad, None, None, down_grad, up_grad, None
