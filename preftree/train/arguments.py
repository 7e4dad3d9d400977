"""The trainer's configuration from the command's settings; making it starts the ranks."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from preftree.config.train import TrainSettings
from preftree.distributed.gaudi import require_gaudi
from preftree.distributed.start import start_ranks
from preftree.errors import SettingsError
from preftree.hardware.device import choose_device
from preftree.train.config import DPOConfig


def start_arguments(train: TrainSettings, **more: Any) -> DPOConfig:
    """The trainer's configuration. With several ranks this waits for all and starts their process group.

    Args:
        more: fields of `DPOConfig` that are in none of the training settings.

    Raises:
        SettingsError: transformers refuses a value.
        DeviceError: the device is not there, or ranks did not come.
    """
    values = {**_values(train), **more}
    made = start_ranks(lambda: _made(values), timeout=train.ddp_timeout, world_size=lambda args: args.world_size)
    made.sharding = train.sharding
    return made


def _values(train: TrainSettings) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(DPOConfig) if item.init}
    values = {name: value for name, value in train.as_dict().items() if name in names}
    values |= {"fsdp": None, "fsdp_config": None, "deepspeed": None}  # else Trainer would shard by its own plugins
    # Under its new name only: the old one brings a warning.
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if new in names:
            older = values.pop(old, None)
            values[new] = older if values.get(new) is None else values[new]
    if train.use_habana:
        require_gaudi()
    values["use_cpu"] = choose_device("hpu" if train.use_habana else train.device).value == "cpu"
    if "WORLD_SIZE" not in os.environ:
        values["ddp_backend"] = None  # else accelerate asks for a process group that nobody started
    return values


def _made(values: dict[str, Any]) -> DPOConfig:
    try:
        return DPOConfig(**values)
    except SettingsError:
        raise
    except (ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError) as error:
        raise SettingsError(f"transformers refuses the training flags: {error}") from error


def recomputes(args: DPOConfig) -> bool:
    """Is activation checkpointing asked for? In transformers 5.17 its only name is `gradient_checkpointing`."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
