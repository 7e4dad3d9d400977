"""Share the frozen base model out to ranks with FSDP2 (`fully_shard`, torch ≥ 2.7); LoRA stays whole.

    unit        each layer of the model; embeddings and final norm together
    whole       LoRA (trained, small), and the head with what is tied to it: log-probs read its weight outside
                of any module's forward, where nothing would gather it

A unit's weights are gathered for its forward pass, given back, and gathered again for its backward pass. Nothing
of the base has a gradient, so nothing is ever reduced: the only other traffic is LoRA's one bucket a step. Every
pass is an exchange: all ranks must make the same number of passes (`Ranks.lockstep`), and no unit stays gathered
after one, or the first rank, which alone saves checkpoints (`state_dict` gives units back), would gather alone.
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
    """Replace the frozen weights of `model` by this rank's shards, in place; returns what was done, in words.

    Args:
        device: where the shards go, and everything that stays whole. The model may be elsewhere.
        layers: class names of the units; empty for those that the model class itself wants kept together.

    Raises:
        SettingsError: no module is of a class in `layers`.
        DeviceError: this torch has no `fully_shard` that can leave parameters out.
    """
    causal = causal_model(model)
    body = causal.base_model
    units = _units(body, layers or tuple(getattr(causal, "_no_split_modules", None) or ()), asked=bool(layers))
    whole = {p for p in model.parameters() if p.requires_grad} | set(causal.get_output_embeddings().parameters())
    total = sum(_bytes(p) for p in model.parameters())
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.partition(":")[0], (torch.distributed.get_world_size(),))
        for unit in [*units, body]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    except (ImportError, TypeError) as error:
        raise DeviceError(
            f"sharing out the base model needs torch 2.7 or newer, this is {torch.__version__}"
        ) from error
    _move_whole(model, device)
    kept = sum(_bytes(p) for p in model.parameters())
    kinds = ", ".join(f"{count} {name}" for name, count in Counter(_plain_name(unit) for unit in units).items())
    return (
        f"units {kinds} and the rest of the body; {kept / 2**20:.1f} of {total / 2**20:.1f} MiB on this rank, head "
        f"and LoRA ({sum(_bytes(p) for p in whole) / 2**20:.1f} MiB) whole"
    )


def _units(body: nn.Module, classes: Sequence[str], asked: bool) -> list[nn.Module]:
    found = [module for module in body.modules() if type(module).__name__ in classes]
    if not found and asked:
        known = sorted({type(module).__name__ for module in body.modules()})
        raise SettingsError(
            f"FSDP's transformer_layer_cls_to_wrap: no module of the model is a {' or a '.join(classes)}."
            f"{did_you_mean(classes[0], known)}"
        )
    if not found:  # a model class that names none: the longest list of modules is its layers
        lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
        found = max(([*modules] for modules in lists), key=len, default=[])
    return found


def _move_whole(model: nn.Module, device: str) -> None:
    """What is not sharded to `device`; `Module.to` would touch the shards, which are there already."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for tensor in store.values():
                if tensor is not None and not hasattr(tensor, "to_local"):
                    tensor.data = tensor.data.to(device)


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _plain_name(unit: nn.Module) -> str:
    return type(unit).__name__.removeprefix("FSDP")
