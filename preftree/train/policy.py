"""The model that is trained: loaded, given its adapter, and ready to be attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from preftree.errors import ModelError, SettingsError
from preftree.io.console import Say
from preftree.model.determinism import remove_randomness
from preftree.model.load import code_note, load_model, load_tokenizer, resolve
from preftree.model.lora import ALL_LINEAR, add_adapter
from preftree.model.quantized import is_quantized
from preftree.model.score import causal_model
from preftree.model.targets import all_linear
from preftree.model.weights import refuse_larger_tokenizer
from preftree.train.config import DPOConfig
from preftree.train.reference_models import freeze_adapter_copy, trained_outside_adapter

Model: TypeAlias = PreTrainedModel | PeftModel
_HUB_OPTIONS = ("revision", "token", "cache_dir")


@dataclass(frozen=True, eq=False)
class Policy:
    """The model that is trained.

    Args:
        model: with its adapter, if there is one.
        frozen_adapter: the reference is the adapter `ref`, a frozen copy of the one that is trained.
        adapter_only: nothing but a new adapter is trained.
    """

    model: Model
    frozen_adapter: bool = False
    adapter_only: bool = False


def load_policy(model: str | Model, args: DPOConfig, quantization_config: Any, say: Say) -> Model:
    """The model itself, loaded with `args.model_init_kwargs` if it is given by its name.

    Raises:
        ModelError: it cannot be loaded, or is no causal language model.
        SettingsError: arguments that contradict each other.
    """
    if not isinstance(model, str):
        if quantization_config is not None:
            raise SettingsError(
                "You passed `quantization_config` to the trainer, but your model is already instantiated. Quantization "
                "can only be applied when the model is loaded: pass its name, or leave `quantization_config` out."
            )
        inner = causal_model(model)  # says what is wrong with anything else
        if inner.get_output_embeddings() is None and not inner.can_generate():
            raise ModelError(f"{type(inner).__name__} has no language-model head, so no answer has a log-prob under it")
        if _init_options(args):
            say("note       `model_init_kwargs` is not used: the model is given as an instance, not by its name")
        return model
    options = _init_options(args)
    if quantization_config is not None:
        if "quantization_config" in options:
            raise SettingsError(
                "You set `quantization_config` as a trainer argument and in `args.model_init_kwargs`: leave one out."
            )
        options["quantization_config"] = quantization_config
    dtype = options.pop("dtype", options.pop("torch_dtype", torch.float32))
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) and dtype != "auto":
        raise SettingsError(
            f"`model_init_kwargs`: dtype must be auto or a torch.dtype, as float32. Got {dtype!r} instead."
        )
    source = resolve(model)
    if args.trust_remote_code and (note := code_note(source)):
        say(f"code       {note}")
    try:
        return load_model(source, dtype, remote_code=args.trust_remote_code, **options)
    except TypeError as problem:
        raise SettingsError(f"`model_init_kwargs` cannot be used with {model}: {problem}") from problem


def _init_options(args: DPOConfig) -> dict[str, Any]:
    assert not isinstance(args.model_init_kwargs, str)  # read by the configuration
    options = dict(args.model_init_kwargs or {})
    args.trust_remote_code = bool(options.pop("trust_remote_code", args.trust_remote_code))
    return options


def load_processing_class(given: Any, model: str | Model, loaded: Model, args: DPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token that the model knows of too.

    Raises:
        TypeError: no tokenizer.
        SettingsError: the padding token is not in its vocabulary.
    """
    if given is None:
        options = {key: value for key, value in _init_options(args).items() if key in _HUB_OPTIONS}
        name = model if isinstance(model, str) else str(loaded.config._name_or_path)
        given = load_tokenizer(resolve(name), remote_code=args.trust_remote_code, **options)
    if isinstance(given, ProcessorMixin):
        given = given.tokenizer  # text only: pairs with images are refused by their rows
    if not isinstance(given, PreTrainedTokenizerBase):
        raise TypeError("The `processing_class` must be either a `PreTrainedTokenizerBase` or a `ProcessorMixin`")
    pad = args.pad_token or given.pad_token or given.eos_token
    if pad not in given.get_vocab():
        raise SettingsError(
            f"The specified `pad_token` ('{pad}') is not found in the vocabulary of the given `processing_class` "
            f"({type(given).__name__}). Set a token that exists, or leave it out."
        )
    given.pad_token = pad
    refuse_larger_tokenizer(given, loaded, str(loaded.config._name_or_path or type(loaded).__name__))
    loaded.config.get_text_config().pad_token_id = given.pad_token_id
    if getattr(loaded, "generation_config", None) is not None:
        loaded.generation_config.pad_token_id = given.pad_token_id
    return given


def adapt(model: Model, peft_config: PeftConfig | None, say: Say, *, reference: bool) -> Policy:
    """Put a new adapter on the model, or keep a frozen copy of the one it has.

    Args:
        reference: the reference is made of this model, as no other one is given.

    Raises:
        TypeError, SettingsError, ModelError: an adapter that cannot be used here, with the reason.
    """
    if peft_config is not None:
        _check_peft_config(model, peft_config)
        wrapped = _with_adapter(model, peft_config, say)
        return Policy(wrapped, adapter_only=not trained_outside_adapter(wrapped))
    if not isinstance(model, PeftModel):
        if is_quantized(model):
            raise SettingsError(
                "A quantized model cannot be fine-tuned in full: its weights have no gradients. Train an adapter on it "
                "(`peft_config`, such as peft.LoraConfig), or load the model without quantization."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise SettingsError(
                "No weight of the model is trained: all are frozen (requires_grad is False), and there is no "
                "`peft_config`. Give one, or unfreeze what is to be trained."
            )
        return Policy(model)
    _check_trained(model)
    if not reference:
        return Policy(model)
    if _is_fresh(model):  # as new as one made here: switched off it is the same function
        return Policy(model, adapter_only=not trained_outside_adapter(model))
    freeze_adapter_copy(model)
    return Policy(model, frozen_adapter=not trained_outside_adapter(model))


def _with_adapter(model: PreTrainedModel, config: PeftConfig, say: Say) -> PeftModel:
    """The model with a new adapter; what "all-linear" leaves out is said."""
    if not isinstance(config, LoraConfig) or config.target_modules != ALL_LINEAR:
        return add_adapter(model, config)
    targets = all_linear(model, config.lora_dropout)
    wrapped = add_adapter(model, config, targets)
    for note in targets.notes():
        say(f"           {note}")
    return wrapped


def _check_peft_config(model: Model, peft_config: PeftConfig) -> None:
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            "`peft_config` must be a `peft.PeftConfig` instance (e.g. `peft.LoraConfig`), "
            f"got {type(peft_config).__name__}."
        )
    if isinstance(model, PeftModel):
        raise SettingsError(
            "You passed a `PeftModel` instance together with a `peft_config` to the trainer. Merge and unload the "
            "existing adapter first (`model.merge_and_unload()`), and pass the base model that this gives; or leave "
            "`peft_config` out to train the adapter that is there."
        )
    if peft_config.is_prompt_learning:
        raise ModelError(
            f"{peft_config.peft_type} is not supported: it puts virtual tokens before every sequence, which no token "
            "of a tree stands for. Use an adapter that changes layers, such as LoraConfig."
        )
    if isinstance(peft_config, LoraConfig) and peft_config.task_type is None:
        peft_config.task_type = "CAUSAL_LM"


def _is_fresh(model: PeftModel) -> bool:
    """Is the adapter LoRA as it is initialised, which adds nothing yet?"""
    added = [each for name, each in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]
    other = [name for name, _ in model.named_parameters() if ".lora_magnitude_vector." in name]
    return bool(added) and not other and not any(bool(each.any()) for each in added)


def _check_trained(model: PeftModel) -> None:
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ModelError(
            "prompt-learning adapters (prompt, prefix and P-tuning) are not supported: they put virtual tokens before "
            "every sequence, which no token of a tree stands for"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "no weight of the PeftModel is trained: load the adapter with "
            "`PeftModel.from_pretrained(model, folder, is_trainable=True)`"
        )


def without_dropout(model: Model, say: Say) -> None:
    """Switch dropout off, and say so where there was some."""
    if random := remove_randomness(model):
        say(
            f"dropout    off ({', '.join(random)}), so that policy and reference are the same function; "
            "--disable_dropout false keeps it"
        )


def counted(model: Model) -> str:
    """How many weights there are, and how many of them are trained, in words."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    what = f"{model.active_peft_config.peft_type.value} trains" if isinstance(model, PeftModel) else "training"
    return f"{total / 1e6:.0f} M weights, {what} {trained / 1e6:.2f} M"


def ask_for_router_loss(model: PreTrainedModel, coefficient: float | None) -> None:
    """Have a mixture of experts give its routers' load-balancing loss: with its own weight, or that of the settings.

    Raises:
        SettingsError: a weight for a model that is no mixture.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coefficient:
            raise SettingsError(
                f"`router_aux_loss_coef` is set to {coefficient:g} but {type(model).__name__} is not a "
                "Mixture-of-Experts model that returns its router logits, so there is no auxiliary loss to weight."
            )
        return
    if coefficient is not None:
        config.router_aux_loss_coef = coefficient
    config.output_router_logits = bool(getattr(config, "router_aux_loss_coef", 0.0))
