"""What makes a run this very run: facts about data, weights, objective and schedule, by content and never by name.

Kept in the run folder and in every checkpoint, by the names that messages use. A checkpoint is resumed from only where
all of them are equal; settings that cannot change what is learned (where files go, how memory is spent) are left out.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from preftree.config.train import has_effect
from preftree.forest import Pair, answers_of
from preftree.io.jsonl import to_json
from preftree.train.config import DPOConfig

#: Read as one fact, `pairs per step`: how they are split over ranks and micro-batches does not matter.
_BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
#: Set by Trainer or by us while it is built, or told by what they select.
_DERIVED = {"bf16", "fp16", "use_cpu", "no_cuda", "seed_worker", "accelerator_config", "remove_unused_columns"}


def settings_facts(args: DPOConfig, ranks: int) -> dict[str, Any]:
    """The settings that decide what is learned."""
    kept = {
        f"--{each.name}": to_json(getattr(args, each.name))
        for each in fields(args)
        if each.init and each.name not in _BATCH | _DERIVED and has_effect(each.name)
    }
    return {**kept, "pairs per step": args.pairs_per_step * ranks}


def data_fact(pairs: Iterable[Pair]) -> str:
    """Number and hash of pairs in their order."""
    digest, count = xxhash.xxh3_128(), 0
    for pair in pairs:
        for ids in (pair.prompt_ids, *answers_of(pair), *([pair.ranks] if pair.others else [])):
            digest.update(array("q", [len(ids), *ids]).tobytes())
        count += 1
    return f"{count} pairs ({digest.hexdigest()[:12]})"


def tokenizer_fact(tokenizer: PreTrainedTokenizerBase) -> str:
    """Size and hash of vocabulary and chat template."""
    template = tokenizer.chat_template
    content = json.dumps([sorted(tokenizer.get_vocab().items()), template], default=str)
    return f"{len(tokenizer)} tokens ({xxhash.xxh3_128_hexdigest(content.encode())[:12]})"


def adapter_fact(configs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of each adapter, without where its base came from."""
    return {
        name: {key: to_json(_sorted(value)) for key, value in config.to_dict().items() if key not in _PLACES}
        for name, config in configs.items()
    }


_PLACES = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value
