"""What replaces a module's forward on a CPU: compiled kernels, packed weights, fused norms and activations, LoRA.

`patch` applies all of it, and undoing the `Patches` it was given puts everything back.
"""

from __future__ import annotations

from torch import nn

from preftree.model.cpu.fused import fuse, pack_weights
from preftree.model.cpu.lora_linear import patch_lora
from preftree.model.patch import Patches


def patch(model: nn.Module, patches: Patches, *, kernels: bool, room: int | None = None) -> str:
    """Replace what is faster here, until `patches` are undone; what was done about packed weights, in words.

    Args:
        kernels: use the compiled kernels; without them only LoRA layers get a shorter forward, on any device.
        room: free bytes, of which packed weights may take a part; None packs none.

    Raises:
        DeviceError: the kernels are asked for and cannot be compiled here.
    """
    patch_lora(model, patches)
    if not kernels:
        return ""
    packed = pack_weights(model, patches, room) if room is not None else ""
    fuse(model, patches)
    return packed
