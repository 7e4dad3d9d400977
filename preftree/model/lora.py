"""LoRA through PEFT's own config and file formats."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftree.errors import ModelError, did_you_mean

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    **options: Any,
) -> PeftModel:
    """Put LoRA layers into `model` (arXiv 2106.09685) and freeze everything else.

    Args:
        target_modules: names of linear layers, as PEFT matches them (a module's last name, or a dotted end);
            None adapts every linear layer but the head.
        options: more fields of `peft.LoraConfig`.

    Raises:
        ModelError: a target matches no module, with the names there are.
    """
    if target_modules is not None:
        _check_targets(model, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules is not None else "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
        **options,
    )
    with _without_chatter():
        return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """`model` with the adapter saved in `folder`, for inference.

    Raises:
        ModelError: there is no adapter, or it belongs to another model.
    """
    if not (Path(folder) / "adapter_config.json").is_file() and not (_HUB_ID.fullmatch(folder)):
        raise ModelError(
            f"{folder}: no adapter here (adapter_config.json is missing); give the folder that training wrote"
        )
    try:
        with _without_chatter():
            peft = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, OSError) as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
        raise ModelError(
            f"the adapter {folder} does not fit {type(model).__name__} {model.name_or_path} or cannot be read; give "
            f"the model that it was trained on ({'; '.join(lines[:2])})"
        ) from problem
    return peft


@contextmanager
def _without_chatter() -> Iterator[None]:
    """PEFT asks transformers for a property by its old name; nothing a user could do about that warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def linear_names(model: nn.Module) -> dict[str, int]:
    """Last names of the linear layers and how often each occurs, head included."""
    found = (name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D))
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
