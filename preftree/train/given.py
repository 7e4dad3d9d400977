"""What a trainer's constructor is given, and what of it is refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from preftree.errors import SettingsError
from preftree.train.config import DPOConfig
from preftree.train.dataset import PairDataset, StreamedPairs, is_stream
from preftree.train.policy import Model


@dataclass(frozen=True, eq=False)
class Given:
    """The constructor's arguments that make the model."""

    model: str | Model
    ref_model: PreTrainedModel | None = None
    quantization_config: Any = None
    peft_config: Any = None
    processing_class: Any = None


@dataclass(frozen=True, eq=False)
class Data:
    """What is trained on and evaluated on: as given, or encoded."""

    train: Any
    evaluation: Any = None

    def pair_sets(self) -> list[PairDataset]:
        """The encoded sets that are in memory."""
        sets = [self.train, *(self.evaluation.values() if isinstance(self.evaluation, dict) else [self.evaluation])]
        return [each for each in sets if isinstance(each, PairDataset)]

    @property
    def streamed(self) -> bool:
        sets = [self.train, *(self.evaluation.values() if isinstance(self.evaluation, dict) else [self.evaluation])]
        return any(isinstance(each, StreamedPairs) for each in sets)


def default_config(model: str | Model) -> DPOConfig:
    """The settings where none are given: an output folder named after the model, as in TRL."""
    name = model if isinstance(model, str) else str(model.config._name_or_path)
    return DPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-DPO")


def console_for(args: DPOConfig) -> Console:
    """Where choices are explained: the first rank's terminal."""
    return Console(quiet=args.process_index != 0, soft_wrap=True)


def check_arguments(given: Given, args: DPOConfig, data_collator: Any, data: Data) -> None:
    """Refuse what cannot be used, before anything is loaded.

    Raises:
        SettingsError: an argument, with the reason and what to do.
        TypeError: settings of another class.
    """
    if not isinstance(args, DPOConfig):
        raise TypeError(
            f"`args` must be a preftree.DPOConfig, which takes the same fields. Got `{type(args).__name__}` instead."
        )
    if data.train is None:
        raise SettingsError("`train_dataset` is required")
    refuse_streams(args, data.train, data.evaluation)
    if is_stream(data.train) and args.max_steps <= 0:
        raise SettingsError(
            "`train_dataset` is a stream, which does not tell its length: set `max_steps` in the arguments, so that "
            "the number of training steps is known."
        )
    if args.output_dir and os.path.isfile(args.output_dir):
        raise SettingsError(f"`output_dir` {args.output_dir} is a file: name a folder for what is trained.")
    if data_collator is not None:
        raise SettingsError(
            "`data_collator` cannot be used: a batch is packed into token trees, not collated into padded tensors. "
            "Leave it out; rows that hold `prompt_ids`, `chosen_ids` and `rejected_ids` are trained on as they are."
        )
    if given.ref_model is not None and not isinstance(given.ref_model, nn.Module):
        raise TypeError(
            "`ref_model` must be a model, such as AutoModelForCausalLM.from_pretrained(name). Got "
            f"`{type(given.ref_model).__name__}` instead."
        )
    if given.ref_model is not None and given.ref_model is given.model:
        raise SettingsError(
            "`model` and `ref_model` cannot be the same object. In most cases you should omit `ref_model`: the "
            "reference is then the model before training."
        )
    if args.sync_ref_model and (given.peft_config is not None or isinstance(given.model, PeftModel)):
        raise SettingsError(
            "You passed `sync_ref_model=True` while using a PEFT model, which is not supported: the reference is the "
            "same model with its adapter switched off, so no second one can move. TR-DPO needs full fine-tuning."
        )


def refuse_streams(args: DPOConfig, *data: Any) -> None:
    """Raise SettingsError where reference log-probs are to be computed beforehand of pairs that nobody knows yet."""
    sets = [each for given in data for each in (given.values() if isinstance(given, Mapping) else [given])]
    if args.precompute_ref_log_probs and any(each is not None and is_stream(each) for each in sets):
        raise SettingsError(
            "`precompute_ref_log_probs=True` is not supported with IterableDataset. Use a map-style Dataset, or set "
            "`precompute_ref_log_probs=False`."
        )


def check_hooks(callbacks: Any, *functions: Any) -> None:
    """Refuse callbacks and functions that could only fail once training has begun.

    Raises:
        TypeError: which of them.
    """
    if not isinstance(callbacks, list | tuple | None):
        raise TypeError(f"`callbacks` must be a list of callbacks. Got `{type(callbacks).__name__}` instead.")
    for name, function in zip(("compute_metrics", "preprocess_logits_for_metrics"), functions, strict=True):
        if function is not None and not callable(function):
            raise TypeError(f"`{name}` must be a function. Got `{type(function).__name__}` instead.")
