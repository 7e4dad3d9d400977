"""Everything a training run can be told: four groups of settings, checked together.

The flags of the original `dpo_clm.py` keep their names and meaning. The training group holds the fields of
transformers' TrainingArguments, read without importing it, and those of DPO. Reading a command line changes nothing
and starts nothing; a wrong value raises SettingsError, which lists everything that is wrong at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from preftree.config.checks import refuse
from preftree.config.choices import DEVICES
from preftree.config.dpo import LossFields
from preftree.config.flags import CHOSEN_LATER, flags_of
from preftree.config.legacy import OLD_FLAGS
from preftree.config.names import TRAINING
from preftree.config.parser import Command, FlagParser, filled
from preftree.config.resume import with_own_settings
from preftree.config.shared import DataSettings, LoraSettings, ModelSettings
from preftree.config.train_checks import advice, check_pair_rule, check_training, check_validation
from preftree.config.trainer_flags import trainer_flags
from preftree.distributed.sharding import Sharding, read_sharding
from preftree.io.secrets import REDACTED, redacted

# Settings that cannot change what is learned, beyond rounding: a run may be resumed with others.
_WITHOUT_EFFECT = """
    per_device_train_batch_size gradient_accumulation_steps
    output_dir overwrite_output_dir resume_from_checkpoint reference_cache token use_auth_token hub_token cache_dir
    dry_run overwrite_cache tokens_per_forest max_memory profile device use_cpu fsdp fsdp_config deepspeed
    gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs attention
    auto_find_batch_size torch_empty_cache_steps run_name project report_to disable_tqdm debug local_rank
    skip_memory_metrics do_train do_eval do_predict per_device_eval_batch_size prediction_loss_only
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
"""
_WITHOUT_EFFECT_PREFIXES = ("log_", "logging_", "save_", "eval_", "hub_", "push_to_", "trackio_", "ddp_", "sample_")


@dataclass
class TrainSettings(LossFields):
    """How to train: the flags of DPO, and as attributes those of transformers' TrainingArguments (`trainer`)."""

    _argument_group_name: ClassVar[str] = "train"

    output_dir: str | None = None
    """Folder for the adapter, checkpoints and logs."""
    precompute_ref_log_probs: bool = False
    """Compute all reference log-probs before the first step instead of in the steps that need them."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture-of-experts model's load-balancing loss; by default the model's own, 0 switches it off."""
    disable_dropout: bool = True
    """No dropout while training, so that policy and reference are the same function at the start."""
    tokens_per_forest: int | None = None
    """Tokens per forward pass, by default what memory allows; the objective does not depend on it."""
    max_memory: str | None = None
    """Memory that the process may use, such as 2GB: forests get smaller, and activations are recomputed if needed."""
    resume_from_checkpoint: str | None = field(default=None, metadata={"bare": True})
    """An output folder whose run goes on, with no other flag; a checkpoint folder; alone or as `last`, the last one."""
    profile: bool = False
    """Print where the second step's time goes, by kind of layer."""
    reference_cache: bool = True
    """Keep reference log-probs on disk, by content, for later runs (preftree cache info says where)."""
    overwrite_output_dir: bool = False
    """Start afresh in an output folder that holds an earlier run, whose files are deleted."""
    device: str = field(default="auto", metadata={"choices": DEVICES})
    """Where to compute; auto takes a GPU or another accelerator if there is one."""
    use_habana: bool = False
    """Train on Intel Gaudi; needs its software stack."""
    use_lazy_mode: bool = False
    """Gaudi's legacy lazy mode, which its vendor no longer develops; eager mode otherwise."""
    use_hpu_graphs_for_training: bool = False
    """Gaudi: replay recorded graphs while training; needs --use_lazy_mode."""
    pad_max: bool = False
    """Fixed shapes: every forest is padded to the same size, for devices that compile for each shape."""
    gaudi_config_name: str | None = None
    """Accepted for old command lines; optimum-habana's configuration files have no counterpart here."""
    logging_steps: float = 10
    """Steps between two log lines; below 1 a share of all steps."""
    remove_unused_columns: bool = False
    """Kept off: batches are forests and not the columns of a table."""
    dry_run: bool = False
    """Train a few steps in a temporary folder, say how long the run will take and how much memory, and stop."""
    sample_prompts: str | None = None
    """Answer these prompts while training, greedily and drawn, into the run folder: N of the data, or a file's."""
    sample_steps: int | None = None
    """Steps between two rounds of answers; by default four rounds."""
    sample_tokens: int = 128
    """Maximum tokens of such an answer."""
    report_to: str | list[str] = "none"
    """Further trackers (tensorboard, wandb, …); the run folder is always written."""
    disable_tqdm: bool = True
    """No progress bars beside the live line."""

    trainer: dict[str, Any] = field(default_factory=dict, repr=False, metadata={"no_flag": True})
    sharding: Sharding = field(default_factory=Sharding, init=False)

    def __post_init__(self) -> None:
        self.trainer = trainer_defaults() | self.trainer
        problems = check_training(self)
        everything = {**self.trainer, **vars(self)}
        self.sharding = read_sharding(self.fsdp, self.fsdp_config, self.deepspeed, everything, os.environ, problems)
        if self.use_cpu:
            self.device = "cpu"
        self.trainer["use_cpu"] = self.device == "cpu"
        refuse(problems)

    def __getattr__(self, name: str) -> Any:
        """A field of TrainingArguments."""
        try:
            return self.__dict__["trainer"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}") from None

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name."""
        own = {name: getattr(self, name) for name in flags_of(TrainSettings)}
        return self.trainer | own


def trainer_defaults() -> dict[str, Any]:
    """The defaults of TrainingArguments' fields that are none of ours, as far as its source states them."""
    own = {item.name for item in dataclasses.fields(TrainSettings)}
    flags = (flag for flag in trainer_flags().values() if flag.name not in own and flag.default is not CHOSEN_LATER)
    return {flag.name: list(flag.default) if isinstance(flag.default, list) else flag.default for flag in flags}


@dataclass
class Settings:
    """All settings of a run; `notes` are words for the user about how they were read."""

    model: ModelSettings
    data: DataSettings
    lora: LoraSettings
    train: TrainSettings
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain JSON values by group, without secrets; a file with them is a settings file."""
        groups = {name: dataclasses.asdict(getattr(self, name)) for name in ("model", "data", "lora")}
        groups["train"] = self.train.as_dict()
        return {name: {key: _shown(key, value) for key, value in group.items()} for name, group in groups.items()}

    def fingerprint(self) -> str:
        """A hash of the settings that affect what is learned; runs that have it in common are the same run.

        Left out are names of places, logging, saving, worker counts and whatever trades memory for time. The
        number of ranks is no setting and not in it.
        """
        kept = {
            group: {key: value for key, value in values.items() if has_effect(key)}
            for group, values in self.as_dict().items()
        }
        text = json.dumps(kept, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_settings(argv: Sequence[str]) -> Settings:
    """Read `[settings.yaml] --flag value …`; `--resume RUN` takes all others from that run.

    Raises SettingsError with every problem found: unknown names, values of a wrong type, values out of range,
    settings that contradict each other. `--help` prints the flags and exits with 0.
    """
    parsed = parser().parse(with_own_settings(argv, parser()))
    ours = flags_of(TrainSettings)
    parsed.values["trainer"] = {
        name: parsed.values[name] for name in trainer_flags() if name in parsed.given and name not in ours
    }
    groups: list[Any] = filled(COMMAND.groups, parsed)
    check_validation(parsed.values, parsed.problems)
    refuse(parsed.problems)
    settings = Settings(*groups)
    check_pair_rule(settings.train, settings.data)
    settings.notes = parsed.notes + advice(settings.train, settings.lora)
    return settings


COMMAND = Command(
    name="train",
    summary="Train a model by DPO on preference pairs; every prompt is computed once.",
    groups=(ModelSettings, DataSettings, LoraSettings, TrainSettings),
    common=(
        "model_name_or_path", "dataset_name", "output_dir", "validation_file", "validation_split_percentage",
        "max_length", "max_prompt_length", "beta", "loss_type", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_rank",
        "lora_alpha", "torch_dtype", "device", "max_memory", "save_steps", "eval_strategy", "resume_from_checkpoint",
        "overwrite_output_dir", "sample_prompts", "dry_run", "seed",
    ),
    examples=(
        "preftree train --model smollm2 --dataset_name pairs.jsonl --out run1",
        "preftree train settings.yaml --beta 0.05 --out run2",
        "torchrun --nproc_per_node 2 -m preftree train settings.yaml",
    ),
    old_flags=OLD_FLAGS,
    foreign=TRAINING,
)  # fmt: skip


#: Help for flags of transformers that people use, shorter than theirs.
_HELP = {
    "learning_rate": "Learning rate after warmup.",
    "lr_scheduler_type": "Schedule: linear, cosine, constant, …",
    "warmup_steps": "Steps of linear warmup; below 1 a share.",
    "num_train_epochs": "Passes over the training pairs.",
    "max_steps": "Optimizer steps, in place of epochs.",
    "per_device_train_batch_size": "Pairs per batch on each device.",
    "gradient_accumulation_steps": "Batches per step.",
    "save_steps": "Steps between checkpoints; below 1 a share.",
    "eval_strategy": "Evaluate while training: no, steps or epoch.",
    "seed": "Seed of data order and LoRA weights.",
}


@functools.cache
def parser() -> FlagParser:
    """The parser of `preftree train`."""
    flags = {name: dataclasses.replace(flag, help=_HELP.get(name, flag.help)) for name, flag in trainer_flags().items()}
    return FlagParser(dataclasses.replace(COMMAND, more_flags=flags))


def _shown(key: str, value: Any) -> Any:
    if key.endswith("token") and isinstance(value, str):
        return REDACTED
    return redacted(value) if isinstance(value, str) else value


def has_effect(key: str) -> bool:
    return key not in _WITHOUT_EFFECT.split() and not key.startswith(_WITHOUT_EFFECT_PREFIXES)
