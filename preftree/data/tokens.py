"""Encoded pairs on disk, keyed by content, so that the next run on the same texts starts at once.

    CACHE/tokens/<key>/pairs.safetensors

`<key>` is a hash of everything that makes the token ids what they are: the pairs in their order with all that their
messages hold, the tokenizer (its class, model, template and special tokens, never its name), the date where the
template writes it, the lengths, and the code that encodes, with the versions of the libraries that it calls.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from preftree.data.encode import EncodedPair, EncodeReport, encode_pairs
from preftree.data.record import PreferencePair
from preftree.io.atomic import atomic_path
from preftree.io.cache import cache_folder

# What a template may ask the clock for and still write the same all day.
_CLOCK = re.compile(r"strftime_now\s*\(")
_DAYS = re.compile(r"strftime_now\s*\(\s*(['\"])((?:[^%'\"]|%[-_#]?[aAbBdeDFGhjmuUVwWxyY%])*)\1\s*\)")
_CHANCE = re.compile(r"\|\s*random\b")


class Lengths(TypedDict):
    """What bounds a pair; see `PairEncoder`."""

    max_length: int | None
    max_prompt_length: int | None
    truncation_mode: str


def remembered_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    afresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[EncodedPair], EncodeReport, bool]:
    """`encode_pairs`, from the cache folder where the same was encoded before, else put there.

    Args:
        afresh: encode even what is in the cache.

    Returns:
        the pairs, the report of their encoding, and whether they came from the cache.
    """
    lengths: Lengths = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "truncation_mode": truncation_mode,
    }
    key = content_key(pairs, tokenizer, lengths)
    file = cache_folder("tokens") / key / "pairs.safetensors" if key else None
    if file is not None and not afresh:
        try:
            return *_read(file), True
        except (OSError, SafetensorError, KeyError, ValueError):  # not there, or damaged: encoded again
            pass
    encoded, report = encode_pairs(pairs, tokenizer, **lengths, progress=progress)
    if file is not None:
        _write(file, encoded, report)
    return encoded, report, False


def content_key(pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, lengths: Lengths) -> str | None:
    """Hash of what decides the token ids; None where that cannot be written down.

    That is so for a slow tokenizer, and for a template that writes the time of day or draws by chance.
    """
    template = json.dumps(tokenizer.chat_template)
    clock = written_dates(template)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or clock is None:
        return None
    digest = xxhash.xxh3_128(_code())
    kind = type(tokenizer)
    made_of = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "switches": {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool)},
        "model": tokenizer.backend_tokenizer.to_str(),
        "template": template,
        "dates": clock,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "lengths": lengths,
    }
    digest.update(json.dumps(made_of, sort_keys=True, default=str).encode())
    for pair in pairs:
        answers = [(answer.content, answer.keys) for answer in pair.answers]
        digest.update(json.dumps([pair.prompt_parts, answers, pair.ranks, pair.row, pair.source]).encode())
    return digest.hexdigest()


def written_dates(template: str, now: datetime | None = None) -> list[str] | None:
    """The dates that a chat template asks the clock for; None where it asks for more than the day, or throws dice."""
    now = now or datetime.now()
    template = template.replace('\\"', '"')
    days = [found.group(2) for found in _DAYS.finditer(template)]
    if len(days) != len(_CLOCK.findall(template)) or _CHANCE.search(template):
        return None
    return [now.strftime(day) for day in days]


@cache
def _code() -> bytes:
    """The code that reads and encodes pairs, with the versions of the libraries that it calls."""
    digest = xxhash.xxh3_128()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for library in ("transformers", "tokenizers", "jinja2"):
        digest.update(version(library).encode())
    return digest.digest()


def _write(file: Path, pairs: Sequence[EncodedPair], report: EncodeReport) -> None:
    """Beside the final name, then renamed: a kill leaves no half of a file. A full disk costs the cache only."""
    parts = [ids for pair in pairs for ids in (pair.prompt_ids, *pair.answers)]
    arrays: dict[str, Any] = {
        "ids": np.array([token for ids in parts for token in ids], dtype=np.int32),
        "lengths": np.array([len(ids) for ids in parts], dtype=np.int32),
        "answers": np.array([len(pair.answers) for pair in pairs], dtype=np.int32),
        "ranks": np.array([rank for pair in pairs for rank in pair.ranks], dtype=np.int32),
        "rows": np.array([pair.row for pair in pairs], dtype=np.int64),
    }
    sources = [pair.source for pair in pairs]
    said = {
        "report": json.dumps({each.name: getattr(report, each.name) for each in fields(report)}),
        "sources": json.dumps(sources),
    }
    with suppress(OSError, SafetensorError), atomic_path(file) as temporary:
        save_file(arrays, temporary, metadata=said)


def _read(file: Path) -> tuple[list[EncodedPair], EncodeReport]:
    with safe_open(file, framework="numpy") as content:
        flat, rows = content.get_tensor("ids").tolist(), content.get_tensor("rows").tolist()
        ends = content.get_tensor("lengths").cumsum().tolist()
        counts, ranks = content.get_tensor("answers").tolist(), iter(content.get_tensor("ranks").tolist())
        said = content.metadata()
    parts = iter([tuple(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False)])
    pairs = []
    for row, source, count in zip(rows, json.loads(said["sources"]), counts, strict=True):
        prompt, chosen, rejected, *others = islice(parts, 1 + count)
        pairs.append(
            EncodedPair(prompt, chosen, rejected, row, source, tuple(others), tuple(islice(ranks, count)))
        )  # fmt: skip
    report = EncodeReport(**json.loads(said["report"]))
    report.dropped, report.events = Counter(report.dropped), Counter(report.events)
    return pairs, report
