"""transformers' TrainingArguments from the settings of a run; making them starts the ranks."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from transformers import TrainingArguments

from preftree.config.train import TrainSettings
from preftree.distributed.gaudi import require_gaudi
from preftree.distributed.start import start_ranks
from preftree.errors import SettingsError
from preftree.hardware.device import choose_device


def start_arguments(train: TrainSettings) -> TrainingArguments:
    """The arguments of transformers' Trainer. With several ranks this waits for all and starts their process group.

    Raises:
        SettingsError: transformers refuses a value.
        DeviceError: the device is not there, or ranks did not come.
    """
    values = _values(train)
    return start_ranks(lambda: _made(values), timeout=train.ddp_timeout, world_size=lambda made: made.world_size)


def _values(train: TrainSettings) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
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


def _made(values: dict[str, Any]) -> TrainingArguments:
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError) as error:
        raise SettingsError(f"transformers refuses the training flags: {error}") from error
