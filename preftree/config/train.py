"""Everything a training run can be told: four groups of settings, checked together.

The flags of the original `dpo_clm.py` keep their names and meaning; the training group is
`transformers.TrainingArguments` and a few fields more. The docstring below a field is its help text.
A wrong value raises SettingsError, which lists everything that is wrong at once.
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

from accelerate.utils import convert_file_size_to_int
from transformers import TrainingArguments

from preftree.config.choices import PAIR_RULES
from preftree.config.parser import FlagParser, filled
from preftree.config.parser import one_of as _one_of
from preftree.config.parser import refuse as _raise
from preftree.config.parser import within as _within
from preftree.distributed.rendezvous import meet
from preftree.distributed.sharding import Sharding, read_sharding
from preftree.errors import DeviceError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOSS_TYPES = ("sigmoid", "ipo", "hinge")

# Settings that cannot change what is learned, beyond rounding: a run may be resumed with others.
_WITHOUT_EFFECT = """
    output_dir overwrite_output_dir resume_from_checkpoint reference_cache token use_auth_token hub_token cache_dir
    overwrite_cache tokens_per_forest max_memory profile
    gradient_checkpointing
    gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs attention
    auto_find_batch_size torch_empty_cache_steps run_name project report_to disable_tqdm debug local_rank
    skip_memory_metrics do_train do_eval do_predict per_device_eval_batch_size prediction_loss_only
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
"""
_WITHOUT_EFFECT_PREFIXES = ("log_", "logging_", "save_", "eval_", "hub_", "push_to_", "trackio_", "ddp_")


@dataclass
class ModelSettings:
    """Which model and tokenizer, and how they are loaded."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = None
    """Hub id or folder of the model to train; 'smollm2' is the small model that comes with the demo."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    model_revision: str = "main"
    """Branch, tag or commit of the model on the hub."""
    use_fast_tokenizer: bool = True
    """Use the tokenizer's fast implementation."""
    use_auth_token: bool = False
    """Use the token that the hub's own login command has stored, for private models and data."""
    token: str | None = field(default=None, repr=False)
    """A hub token for private models and data; it is never written anywhere."""
    cache_dir: str | None = None
    """Where models and data from the hub are kept."""
    torch_dtype: str = field(default="auto", metadata={"aliases": ["--dtype"]})
    """Precision of weights and computation: auto (what is fast here), float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Refused when true: code that comes with a model is not run."""
    attention: str = "auto"
    """Attention backend; auto takes the fastest one that agrees with the model's own attention."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.model_name_or_path:
            problems.append("--model_name_or_path is missing: name a hub id or a model folder.")
        _one_of(problems, "torch_dtype", self.torch_dtype, DTYPES)
        if self.trust_remote_code:
            problems.append(
                "--trust_remote_code is not supported: code from a model's repository would run as you,"
                " and token trees need the attention of transformers' own model classes. Leave the flag out."
            )
        _raise(problems)

    @property
    def auth(self) -> str | bool | None:
        """What the hub's loaders take as their `token`."""
        return self.token or (True if self.use_auth_token else None)


@dataclass
class DataSettings:
    """Which preference pairs, how many, and how long they may be."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = None
    """Hub id, a local file (jsonl, json, csv, parquet) or a folder of such files."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set, where it has several."""
    validation_file: str | None = None
    """A file to validate on; without it a validation split is used, or a share of the training pairs."""
    validation_split_percentage: float = 2
    """Share of the training pairs held out for validation where no validation data is given, in percent."""
    streaming: bool = False
    """Read a hub data set row by row without downloading all of it."""
    overwrite_cache: bool = False
    """Prepare the data again even if a prepared copy exists."""
    max_length: int = 1024
    """Longest prompt and answer together, in tokens; longer answers are cut at their end."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens; longer prompts are cut at their start."""
    max_train_samples: int | None = None
    """Train on the first so many pairs only."""
    max_eval_samples: int | None = None
    """Validate on the first so many pairs only."""

    pair_rule: str = "best_worst"
    """Pairs made of a prompt's ranked answers: best_worst, best_each (best against each other one) or all."""
    min_margin: float = 0.0
    """Make pairs only of answers whose scores differ by more than this."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        _one_of(problems, "pair_rule", self.pair_rule, PAIR_RULES)
        _within(problems, "min_margin", self.min_margin, 0)
        if not self.dataset_name:
            problems.append("--dataset_name is missing: name a hub id, a file or a folder with preference pairs.")
        _within(problems, "validation_split_percentage", self.validation_split_percentage, 0, 99)
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "max_prompt_length",
        ):
            _within(problems, name, getattr(self, name), 1)
        _within(problems, "max_length", self.max_length, 2)
        if self.max_prompt_length >= self.max_length:
            problems.append(
                f"--max_prompt_length must be less than --max_length, or no token is left for an answer. Got"
                f" {self.max_prompt_length} and {self.max_length}."
            )
        _raise(problems)


@dataclass
class LoraSettings:
    """The adapter that is trained."""

    _argument_group_name: ClassVar[str] = "lora"

    lora_rank: int = 8
    """Rank of the adapter's matrices."""
    lora_alpha: int = 16
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before the adapter; it acts only with --disable_dropout false."""
    lora_all_linear: bool = True
    """Adapt every linear layer except the head; false when only --lora_target_modules are meant."""
    lora_target_modules: list[str] | None = None
    """Names of the linear layers to adapt (words or a comma list); needs --lora_all_linear false."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        _within(problems, "lora_rank", self.lora_rank, 1)
        _within(problems, "lora_alpha", self.lora_alpha, 1)
        _within(problems, "lora_dropout", self.lora_dropout, 0, 1, below=True)
        given: str | list[str] = self.lora_target_modules or []
        words = (given if isinstance(given, str) else ",".join(given)).replace("'", "").replace('"', "").split(",")
        self.lora_target_modules = [word.strip() for word in words if word.strip()] or None
        if not self.lora_all_linear and not self.lora_target_modules:
            problems.append("--lora_all_linear false needs --lora_target_modules: name the layers to adapt.")
        _raise(problems)


@dataclass(repr=False)  # the inherited repr hides tokens
class TrainSettings(TrainingArguments):
    """How to train: the flags of transformers' TrainingArguments, and those of DPO."""

    _argument_group_name: ClassVar[str] = "training"

    beta: float = 0.1
    """Strength of the pull towards the reference model (the beta of the DPO paper)."""
    loss_type: str = "sigmoid"
    """sigmoid (DPO; with --label_smoothing cDPO), ipo or hinge."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round, below 0.5 (cDPO); sigmoid loss only."""
    disable_dropout: bool = True
    """No dropout while training, so that policy and reference are the same function at the start."""
    tokens_per_forest: int | None = None
    """Tokens computed at once, by default what memory allows; the objective does not depend on it."""
    max_memory: str | None = None
    """Memory that the process may take, such as 2GB: forests get smaller, activations are recomputed where need be."""
    profile: bool = False
    """Print where the second step's time goes, by kind of layer."""
    reference_cache: bool = True
    """Keep reference log-probs on disk, by content, for later runs (preftree cache info says where)."""
    overwrite_output_dir: bool = False
    """Start afresh in an output folder that holds an earlier run, whose files are deleted."""
    use_habana: bool = False
    """Train on Intel Gaudi; needs its software stack."""
    use_lazy_mode: bool = False
    """Gaudi's legacy lazy mode, which its vendor no longer develops; eager mode otherwise."""
    use_hpu_graphs_for_training: bool = False
    """Gaudi: replay recorded graphs while training; needs --use_lazy_mode."""
    pad_max: bool = False
    """Fixed shapes: every forest is filled up to the same size, for devices that compile for each shape."""
    gaudi_config_name: str | None = None
    """Accepted for old command lines; optimum-habana's configuration files have no counterpart here."""
    logging_steps: float = 10
    """Steps between two log lines; below 1 a share of all steps."""
    remove_unused_columns: bool = False
    """Kept off: batches are forests and not the columns of a table."""
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (HfArgumentParser takes the second type)
    """Further trackers (tensorboard, wandb, …); the run folder is always written."""
    disable_tqdm: bool | None = True
    """No progress bars beside the live line."""

    notes: list[str] = field(default_factory=list, init=False)
    sharding: Sharding = field(default_factory=Sharding, init=False)
    cpu_by_default: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        problems = self._problems()
        args: TrainingArguments = self
        self.sharding = read_sharding(args.fsdp, args.fsdp_config, args.deepspeed, vars(self), os.environ, problems)
        args.fsdp = args.fsdp_config = args.deepspeed = None  # else Trainer would shard by plugins of its own
        if args.activation_checkpointing is None:  # said here so that the old name brings no warning
            args.activation_checkpointing = args.gradient_checkpointing
        if not args.use_cpu and not _accelerator_available():
            args.use_cpu = True  # else --bf16 is refused as a GPU setting
            self.cpu_by_default = True
            if not self.use_habana:
                self.notes.append("No GPU or other accelerator was found: training runs on the CPU.")
        if args.ddp_backend and "WORLD_SIZE" not in os.environ:
            args.ddp_backend = None  # else accelerate asks for a process group that nobody started
            self.notes.append("--ddp_backend does nothing with a single process.")
        if "WORLD_SIZE" in os.environ:
            _raise(problems)  # before others are waited for
        meeting = meet(self.ddp_timeout)
        try:
            super().__post_init__()
        except (ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError) as error:
            problems.append(f"transformers refuses the training flags: {error}")
        except RuntimeError as error:
            if "WORLD_SIZE" not in os.environ:
                raise
            where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            raise DeviceError(f"the ranks lost each other at {where}: {str(error).splitlines()[0]}") from error
        del meeting  # torch's process group is there and holds the place
        _raise(problems)

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes. ValueError where it is none."""
        return convert_file_size_to_int(self.max_memory) if self.max_memory is not None else None

    def _problems(self) -> list[str]:
        problems: list[str] = []
        if not self.output_dir:
            problems.append("--output_dir is missing: name a folder for the adapter, the checkpoints and the logs.")
        _within(problems, "beta", self.beta, 0, above=True)
        _one_of(problems, "loss_type", self.loss_type, LOSS_TYPES)
        _within(problems, "label_smoothing", self.label_smoothing, 0, 0.5, below=True)
        if self.label_smoothing and self.loss_type in LOSS_TYPES and self.loss_type != "sigmoid":
            problems.append(
                f"--label_smoothing has no meaning for --loss_type {self.loss_type}: leave one of them out."
            )
        if self.label_smoothing_factor:
            problems.append("--label_smoothing_factor is for next-token losses; DPO's is --label_smoothing.")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            _within(problems, name, getattr(self, name), 1)
        _within(problems, "tokens_per_forest", self.tokens_per_forest, 1)
        try:
            fits = self.max_bytes is None or self.max_bytes > 0
        except ValueError:
            fits = False
        if not fits:
            problems.append(f"--max_memory {self.max_memory}: write a number and a unit, such as 2GB or 1500MiB.")
        for name in (
            "learning_rate",
            "weight_decay",
            "warmup_steps",
            "max_grad_norm",
            "save_steps",
            "eval_steps",
        ):
            _within(problems, name, getattr(self, name), 0)
        if self.max_steps <= 0:
            _within(problems, "num_train_epochs", self.num_train_epochs, 0, above=True)
        if self.use_habana and self.use_cpu:
            problems.append("--use_habana and --use_cpu contradict each other: leave one of them out.")
        if self.use_hpu_graphs_for_training and not self.use_lazy_mode:
            problems.append("--use_hpu_graphs_for_training needs --use_lazy_mode: add it, or leave the graphs out.")
        return problems

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step on one rank, however they are cut into forests."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass
class Settings:
    """All settings of a run; `notes` are words for the user about how they were read."""

    model: ModelSettings
    data: DataSettings
    lora: LoraSettings
    train: TrainSettings
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain JSON values by group, without tokens."""
        groups = {name: dataclasses.asdict(getattr(self, name)) for name in ("model", "data", "lora")}
        groups["train"] = self.train.to_dict()
        return {name: {key: _shown(key, value) for key, value in group.items()} for name, group in groups.items()}

    def fingerprint(self) -> str:
        """A hash of the settings that affect what is learned; runs that have it in common are the same run.

        Left out are names of places, logging, saving, worker counts and whatever trades memory for time. The
        number of ranks is no setting and not in it.
        """
        kept = {
            group: {key: value for key, value in values.items() if _has_effect(key)}
            for group, values in self.as_dict().items()
        }
        text = json.dumps(kept, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_settings(argv: Sequence[str]) -> Settings:
    """Read `[settings.yaml] --flag value …`.

    Raises SettingsError with every problem found: unknown names, values of a wrong type, values out of range,
    settings that contradict each other. `--help` prints the flags and exits with 0.
    """
    parsed = _parser().parse(argv)
    groups = filled(_GROUPS, parsed)
    _raise(parsed.problems)
    settings = Settings(*groups)
    settings.notes = parsed.notes + settings.train.notes + _advice(settings)
    return settings


_GROUPS = (ModelSettings, DataSettings, LoraSettings, TrainSettings)


@functools.cache
def _parser() -> FlagParser:
    return FlagParser(_GROUPS)


def _advice(settings: Settings) -> list[str]:
    """Notes on settings that are accepted and do not do what one might think."""
    notes = []
    train, lora = settings.train, settings.lora
    if train.gaudi_config_name:
        notes.append("--gaudi_config_name: ignored, optimum-habana's configuration has no counterpart here.")
    if train.use_lazy_mode and train.use_habana:
        notes.append("--use_lazy_mode: the vendor no longer develops lazy mode; eager mode is the default here.")
    if train.pad_max and not train.use_habana:
        notes.append("--pad_max: fills up forests for devices that compile for each shape; here it only costs time.")
    if train.use_habana and not train.pad_max:
        notes.append("--use_habana without --pad_max true: the device compiles for each forest's own shape.")
    if train.use_hpu_graphs_for_training and train.use_habana:
        notes.append(
            "--use_hpu_graphs_for_training: changes nothing; with --pad_max true lazy mode compiles a pass once and"
            " runs it again, and graphs recorded beside that could not be checked without a card."
        )
    if (train.use_lazy_mode or train.use_hpu_graphs_for_training) and not train.use_habana:
        notes.append("--use_lazy_mode and --use_hpu_graphs_for_training do nothing without --use_habana.")
    if lora.lora_all_linear and lora.lora_target_modules:
        notes.append("--lora_all_linear is on, so --lora_target_modules is not used; add --lora_all_linear false.")
    return notes


def _shown(key: str, value: Any) -> Any:
    if key.endswith("token") and isinstance(value, str):
        return "<redacted>"
    return value


def _has_effect(key: str) -> bool:
    return key not in _WITHOUT_EFFECT.split() and not key.startswith(_WITHOUT_EFFECT_PREFIXES)


def _accelerator_available() -> bool:
    import torch
    from transformers.utils.import_utils import is_torch_hpu_available

    return torch.accelerator.is_available() or is_torch_hpu_available()
