"""LoRA through PEFT's own config and file formats."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from preftree.errors import ModelError, did_you_mean
from preftree.model.load import refuse_pickled
from preftree.model.targets import LINEAR, Targets, all_linear
from preftree.model.weights import refuse_not_finite

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


#: PEFT's word for every linear layer but the head; here it means what `all_linear` finds.
ALL_LINEAR = "all-linear"


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    **options: Any,
) -> PeftModel:
    """Inject LoRA layers into `model` (arXiv 2106.09685) and freeze everything else; see `lora_config`."""
    config = lora_config(model, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, **options)
    return add_adapter(model, config)


def lora_config(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    **options: Any,
) -> LoraConfig:
    """A PEFT config of the LoRA layers that `add_adapter` is to inject into `model`.

    Args:
        target_modules: names of linear layers, as PEFT matches them (a module's last name, or a dotted suffix);
            None adapts what `all_linear` finds: every linear layer but the head, and the experts of mixtures.
        options: more fields of `peft.LoraConfig`.

    Raises:
        ModelError: a target matches no module.
    """
    if target_modules is not None:
        _check_targets(model, target_modules)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules is not None else ALL_LINEAR,
        bias="none",
        task_type="CAUSAL_LM",
        **options,
    )


def add_adapter(model: PreTrainedModel, config: PeftConfig, targets: Targets | None = None) -> PeftModel:
    """Inject a new adapter of any kind into `model` and freeze everything else.

    Args:
        targets: what to adapt where `config` says "all-linear": by default what `all_linear` finds. What PEFT leaves
            out of it is added to what it skips.

    Raises:
        ModelError: PEFT cannot adapt the model as asked.
    """
    if not isinstance(config, LoraConfig) or config.target_modules != ALL_LINEAR:
        return _inject(model, config)
    targets = targets or all_linear(model, config.lora_dropout)
    if not (targets.modules or targets.parameters or config.target_parameters):
        raise ModelError(
            f"{type(model).__name__} has no linear layer that LoRA can adapt; {'; '.join(targets.notes())}"
        )
    peft = _inject(model, _with_targets(config, targets.modules, targets.parameters))
    missed = _not_adapted(peft, targets.modules)
    # Where transformers 5 has stacked a mixture's experts, PEFT takes the names of their former layers (`up_proj`) for
    # the stacked parameters, although other layers (shared experts, say) have these names, too. Their weights are
    # parameters as well.
    if missed and config.lora_dropout:
        for name in missed:
            targets.skip(name, model.get_submodule(name).weight.numel(), "PEFT takes it for experts, without dropout")
    elif missed:
        modules = [name for name in targets.modules if name not in missed]
        weights = [*targets.parameters, *(f"{name}.weight" for name in missed)]
        peft = _inject(peft.unload(), _with_targets(config, modules, weights))
    return peft


def _with_targets(config: LoraConfig, modules: Sequence[str], parameters: Sequence[str]) -> LoraConfig:
    own = list(config.target_parameters or ())
    config = copy.deepcopy(config)
    config.target_modules, config.target_parameters = set(modules), [*own, *parameters] or None
    return config


def _not_adapted(peft: PeftModel, names: Sequence[str]) -> list[str]:
    adapted = {
        name.removeprefix("base_model.model.") for name, m in peft.named_modules() if isinstance(m, BaseTunerLayer)
    }
    return [name for name in names if name not in adapted]


def _inject(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    try:
        with without_chatter():
            return get_peft_model(model, config)
    except (ValueError, TypeError) as problem:  # PEFT's refusals of a layer
        raise ModelError(
            f"PEFT cannot adapt {type(model).__name__} as asked: {str(problem).strip().splitlines()[0]} "
            "(--lora_all_linear false with --lora_target_modules names the layers to adapt)"
        ) from problem


def load_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """Load the adapter saved in `folder` onto `model`, for inference.

    Raises:
        ModelError: there is no adapter, it is pickled, incomplete or not finite, or it belongs to another model.
    """
    if not (Path(folder) / "adapter_config.json").is_file() and not (_HUB_ID.fullmatch(folder)):
        raise ModelError(
            f"{folder}: no adapter here (adapter_config.json is missing); give the folder that training wrote"
        )
    if Path(folder).is_dir() and not next(Path(folder).glob("*.safetensors"), None):
        refuse_pickled(Path(folder), f"the adapter {folder}")
    try:
        with without_chatter():
            config = PeftConfig.from_pretrained(folder)
            config.inference_mode = True
            fit_vocabulary(model, folder)
            peft = get_peft_model(model, config)
            loaded = peft.load_adapter(folder, "default", use_safetensors=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
        raise _no_fit(model, folder, "; ".join(lines[:2])) from problem
    for what, names in (("missing", loaded.missing_keys), ("without a place", loaded.unexpected_keys)):
        if names:
            raise _no_fit(model, folder, f"{len(names)} weights are {what}, the first {sorted(names)[0]}")
    refuse_not_finite(((n, p) for n, p in peft.named_parameters() if ".lora_" in n), f"the adapter {folder}")
    return peft


def fit_vocabulary(model: PreTrainedModel, folder: str) -> None:
    """Resize the embeddings of `model` where an adapter brings some for another number of tokens."""
    file = Path(folder) / "adapter_model.safetensors"
    embeddings = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embeddings), None)
    if not file.is_file() or name is None:
        return
    with safe_open(file, "pt") as content:
        key = f"base_model.model.{name}.weight"
        rows = content.get_slice(key).get_shape()[0] if key in content.keys() else None  # noqa: SIM118
    if rows is not None and rows != embeddings.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _no_fit(model: PreTrainedModel, folder: str, why: str) -> ModelError:
    return ModelError(
        f"the adapter {folder} does not fit {type(model).__name__} {model.name_or_path} or cannot be read; give "
        f"the model that it was trained on ({why})"
    )


@contextmanager
def without_chatter() -> Iterator[None]:
    """Without warnings that no user can act on: a transformers property that PEFT reads by its old name, say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # Merging writes two tensors where an adapter changes one of two tied ones.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
        # Of the first of two injections in `add_adapter`.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match", category=RuntimeWarning)
        yield


def linear_names(model: nn.Module) -> dict[str, int]:
    """Last names of the linear layers and the number of layers of each name, head included."""
    found = (name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, LINEAR))
    return dict(Counter(found))


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    modules = [name for name, _ in model.named_modules()]
    unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in modules)]
    if unmatched:
        names = linear_names(model)
        hints = "".join(did_you_mean(target, names) for target in unmatched)
        raise ModelError(
            f"--lora_target_modules: {', '.join(unmatched)} matches no module of {type(model).__name__}."
            f"{hints} Its linear layers are {', '.join(f'{name} ({count})' for name, count in names.items())}"
        )
