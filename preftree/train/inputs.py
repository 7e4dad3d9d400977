"""What a training run reads: pairs from their source to token ids, each step told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from preftree.check.quick import quick_check
from preftree.config.choices import PAIR_RULES
from preftree.config.train import Settings
from preftree.data.encode import EncodedPair
from preftree.data.record import LoadedPairs
from preftree.data.sources import Source, load_pairs
from preftree.data.split import split_validation
from preftree.data.tokens import remembered_pairs
from preftree.errors import DataError
from preftree.io.console import Say, sayer
from preftree.io.progress import Progress
from preftree.train.identity import data_fact


@dataclass(frozen=True)
class EncodedSplits:
    """Encoded pairs, ready to train on, and what was said of the data while they were read."""

    train: list[EncodedPair]
    validation: list[EncodedPair]
    facts: dict[str, Any]
    """What was read, kept and found, for the run folder and the model card."""
    said: tuple[str, ...] = ()


def hub_options(settings: Settings) -> dict[str, Any]:
    """What every loader needs to find a model on the hub."""
    model = settings.model
    return {"revision": model.model_revision, "cache_dir": model.cache_dir, "token": model.auth}


def prepare_pairs(settings: Settings, tokenizer: PreTrainedTokenizerBase, console: Console) -> EncodedSplits:
    """Read, encode and split, saying how many pairs were kept and why others were not.

    Raises:
        DataError: the source cannot be read, or no pair of it can be used.
    """
    data = settings.data
    name = data.dataset_name or ""
    said: list[str] = []
    shown = sayer(console)

    def say(line: str) -> None:
        said.append(line)
        shown(line)

    encode = partial(_encoded, settings, tokenizer=tokenizer, console=console, say=say)
    train, facts = encode(name, "train", data.max_train_samples)
    if data.validation_file:
        validation, how = encode(data.validation_file, "train", None)[0], f"from {data.validation_file}"
    elif _has_validation(settings, name):
        validation, how = encode(name, "validation", None)[0], f"the validation split of {name}"
    else:
        seed = settings.train.data_seed if settings.train.data_seed is not None else settings.train.seed
        train, validation = split_validation(train, data.validation_split_percentage, seed)
        how = f"{data.validation_split_percentage:g} % of the pairs, no prompt in both"
    validation = validation[: data.max_eval_samples]
    say(f"pairs      {len(train)} to train on, {len(validation)} to validate on ({how})")
    facts |= {"training_pairs": len(train), "validation_pairs": len(validation), "validation_from": how}
    return EncodedSplits(train, validation, {**facts, "fingerprint": data_fact(train)}, tuple(said))


def _has_validation(settings: Settings, name: str) -> bool:
    """Does the source bring a validation split of its own? A single file never does."""
    if Path(name).is_file():
        return False
    try:
        return bool(_load(settings, name, "validation", limit=1))
    except DataError:
        return False


def _load(settings: Settings, name: str, split: str, limit: int | None) -> LoadedPairs:
    data = settings.data
    source = Source(
        name,
        split=split,
        config=data.dataset_config_name,
        cache_dir=settings.model.cache_dir,
        token=settings.model.auth,
        streaming=data.streaming,
        download_again=data.overwrite_cache,
    )
    return load_pairs(source, limit=limit, pair_rule=data.pair_rule or PAIR_RULES[0], min_margin=data.min_margin)


def _encoded(
    settings: Settings,
    name: str,
    split: str,
    limit: int | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    say: Say,
) -> tuple[list[EncodedPair], dict[str, Any]]:
    """Pairs of one split, with what is worth keeping about how they were read."""
    data = settings.data
    loaded = _load(settings, name, split, limit)
    of_split = "" if Path(name).is_file() else f" ({split})"
    say(f"data       {name}{of_split}: {len(loaded)} pairs in the format {loaded.format}")
    for reason, count in loaded.skipped.items():
        say(f"           {count} rows gave no pair: {reason}")
    for note, count in loaded.notes.items():
        say(f"           in {count} rows {note}")
    findings = quick_check(loaded, name) if split == "train" else []
    for line in findings:
        say(line)
    pairs, report, remembered = remembered_pairs(
        loaded,
        tokenizer,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        afresh=data.overwrite_cache,
        progress=Progress(console, "           encoding ", "pairs"),
    )
    if remembered:  # nothing about the data, so it is not recorded
        sayer(console)(
            "           token ids of these texts were in the cache folder (--overwrite_cache true encodes again)"
        )
    for line in report.summary():
        say(f"           {line}")
    if not pairs:
        raise DataError(f"{name}: no pair is left to train on; the lines above say why each was dropped")
    read = {"source": name, "format": loaded.format, "rows": loaded.rows, "skipped": dict(loaded.skipped)}
    return pairs, {**read, "findings": findings}
