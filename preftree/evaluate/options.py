"""The arguments of lm-eval's model `hf`: each of them acts here as there, or is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM

from preftree.errors import SettingsError, did_you_mean

#: Arguments that `HFLM` itself acts on, whoever loads the model.
INHERITED = frozenset({
    "add_bos_token", "batch_size", "chat_template_args", "enable_thinking", "max_batch_size", "max_length",
    "prefix_token_id", "think_end_token", "tokenizer", "truncation",
})  # fmt: skip
#: Arguments that `PreftreeLM` acts on.
OWN = frozenset({"device", "dtype", "on_truncation", "peft", "pretrained", "revision", "tokens_per_forest"})

_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(HFLM.__init__).parameters.items()}
#: Values besides the defaults that ask for what happens here anyway.
_SAME = {"backend": ("causal",), "softmax_dtype": ("float32",)}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be dropped without a word.

    Raises:
        SettingsError: an argument that has no effect here, with a value other than `hf`'s default; an unknown one.
    """
    problems = []
    for name, value in options.items():
        if name in INHERITED:
            continue
        if name in _DEFAULTS and (value in (_DEFAULTS[name], None) or value in _SAME.get(name, ())):
            continue
        problems.append(
            f"--model_args {name}={value}: the model preftree does not take it.{did_you_mean(name, INHERITED | OWN)} "
            f"It takes {', '.join(sorted(INHERITED | OWN))}; for anything else use --model hf."
        )
    if problems:
        raise SettingsError(*problems)
