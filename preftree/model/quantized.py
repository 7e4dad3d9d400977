"""Frozen weights quantized by bitsandbytes (QLoRA, arXiv 2305.14314), whose own layers compute.

On a CPU with AVX-512 in bfloat16 a 4-bit layer in eval mode reorders its weight for inference, in place, and from then
on passes no gradient to its input, in training mode either (0.46 to 0.50). Scoring evaluates before it trains, so that
reordering is switched off.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

#: A layer's switch for the order that inference alone can use.
_REORDERS = "support_avx512bf16_for_cpu"
#: 8-bit layers compute in float16 and say so at every call.
_REPEATED = "bitsandbytes.autograd._functions"


def is_quantized(model: Any) -> bool:
    """Are weights of the model quantized?"""
    return bool(getattr(model, "is_quantized", False))


def keep_differentiable(model: nn.Module) -> None:
    """Have quantized layers pass gradients to their inputs at all times."""
    if not is_quantized(model):
        return
    logging.getLogger(_REPEATED).setLevel(logging.ERROR)
    layers = [module for module in model.modules() if hasattr(module, _REORDERS)]
    for layer in layers:
        setattr(layer, _REORDERS, False)
    states = (getattr(layer.weight, "quant_state", None) for layer in layers)
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        model.state_dict()  # puts weights that were reordered before back into their own order
