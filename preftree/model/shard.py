"""Shard the frozen base model across ranks with FSDP2 (`fully_shard`, torch ≥ 2.7); LoRA stays replicated.

    sharded      each layer of the model is a unit; embeddings and final norm form one more
    replicated   LoRA (trained, small), and the head with the weights tied to it: log-probs read its weight
                 outside of any module's forward, where nothing would gather it

A unit's weights are all-gathered for its forward pass, freed, and all-gathered again for its backward pass. The base
has no gradients, so there is no reduce-scatter: the only other traffic is one all-reduce of LoRA's gradients per step.
Every pass is a collective: all ranks make the same number of passes (`Ranks.lockstep`). No unit stays gathered after
a pass (`reshard_after_forward`), because rank 0 alone saves checkpoints and `state_dict` would gather on it alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from preftree.errors import DeviceError, SettingsError, did_you_mean
from preftree.model.score import causal_model


def shard_base(model: PeftModel, device: str, layers: Sequence[str] = ()) -> str:
    """Replace the frozen weights of `model` by this rank's shards, in place; returns a description of the result.

    Args:
        device: of the shards and of everything replicated. The model itself may be on another device.
        layers: class names of the units; empty means the model's own `_no_split_modules`.

    Raises:
        SettingsError: no module is an instance of a class in `layers`.
        DeviceError: the `fully_shard` of this torch cannot ignore parameters.
    """
    causal = causal_model(model)
    body = causal.base_model
    units = _units(body, layers or tuple(getattr(causal, "_no_split_modules", None) or ()), asked=bool(layers))
    replicated = {p for p in model.parameters() if p.requires_grad} | set(causal.get_output_embeddings().parameters())
    total = sum(_bytes(p) for p in model.parameters())
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.partition(":")[0], (torch.distributed.get_world_size(),))
        for unit in [*units, body]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    except (ImportError, TypeError) as error:
        raise DeviceError(f"sharding the base model needs torch 2.7 or newer; this is {torch.__version__}") from error
    _move_replicated(model, device)
    kept = sum(_bytes(p) for p in model.parameters())
    kinds = ", ".join(f"{count} {name}" for name, count in Counter(_plain_name(unit) for unit in units).items())
    return (
        f"units {kinds} and the rest of the body; {kept / 2**20:.1f} of {total / 2**20:.1f} MiB on this rank, head "
        f"and LoRA ({sum(_bytes(p) for p in replicated) / 2**20:.1f} MiB) replicated"
    )


def _units(body: nn.Module, classes: Sequence[str], asked: bool) -> list[nn.Module]:
    found = [module for module in body.modules() if type(module).__name__ in classes]
    if not found and asked:
        known = sorted({type(module).__name__ for module in body.modules()})
        raise SettingsError(
            f"FSDP's transformer_layer_cls_to_wrap: no module of the model is a {' or a '.join(classes)}."
            f"{did_you_mean(classes[0], known)}"
        )
    if not found:  # the model class names none: its longest ModuleList holds the layers
        lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
        found = max(([*modules] for modules in lists), key=len, default=[])
    return found


def _move_replicated(model: nn.Module, device: str) -> None:
    """Move what is not sharded to `device`; `Module.to` would also touch the shards, which are there already."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and not hasattr(tensor, "to_local"):
                    tensor.data = tensor.data.to(device)


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _plain_name(unit: nn.Module) -> str:
    return type(unit).__name__.removeprefix("FSDP")
