"""`DPOConfig`: transformers' TrainingArguments with the fields of DPO (`config.dpo`)."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.utils.import_utils import is_torch_hpu_available

from preftree.config.dpo import DPOFields
from preftree.config.sizes import size_in_bytes
from preftree.config.train_checks import check_trainer
from preftree.distributed.sharding import Sharding, hide_from_accelerate, read_sharding
from preftree.errors import SettingsError
from preftree.train.losses import LOSSES


@dataclass(repr=False)  # the inherited repr hides tokens
class DPOConfig(DPOFields, TrainingArguments):
    """Settings of a `DPOTrainer`: transformers' TrainingArguments and the fields of DPO.

    Raises:
        SettingsError: values that cannot be used, all of them in one message.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    use_habana: bool = False
    """Train on Intel Gaudi; needs its software stack."""
    use_lazy_mode: bool = False
    """Gaudi's legacy lazy mode, which its vendor no longer develops; eager mode otherwise."""

    sharding: Sharding = field(default_factory=Sharding, init=False)

    def __post_init__(self) -> None:
        problems = [*dict.fromkeys([*self.problems(), *check_trainer(self)])]
        if self.label_smoothing_factor:
            problems.append("--label_smoothing_factor is for next-token losses; DPO's is --label_smoothing.")
        args: TrainingArguments = self
        self.sharding = read_sharding(args.fsdp, args.fsdp_config, args.deepspeed, vars(self), os.environ, problems)
        args.fsdp = args.fsdp_config = args.deepspeed = None  # else Trainer would shard by plugins of its own
        if problems:
            raise SettingsError(*problems)
        hide_from_accelerate(os.environ)  # its plugins would shard the model in ways of their own
        if not (torch.accelerator.is_available() or is_torch_hpu_available()):
            self.use_cpu = True  # else --bf16 is refused as a GPU setting
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _fast_bfloat16()
        self.remove_unused_columns = False
        with warnings.catch_warnings():  # the names of transformers 4, which TRL's users write
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            super().__post_init__()
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Make the schedule once, so that its arguments are not refused after minutes of preparation."""
        weights = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        try:
            get_scheduler(self.lr_scheduler_type, weights, 1, 2, self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as problem:
            raise SettingsError(
                f"--lr_scheduler_kwargs {self.lr_scheduler_kwargs} cannot be used with --lr_scheduler_type "
                f"{self.lr_scheduler_type.value}: {problem}"
            ) from problem

    def known_losses(self) -> tuple[str, ...]:
        """Those of preftree, and those that a script has added to `LOSSES`."""
        return tuple(LOSSES)

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes. ValueError where it is none."""
        return None if self.max_memory is None else size_in_bytes(self.max_memory)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step on one rank, however they are cut into forests."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def _fast_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
