"""Encoded pairs on disk, keyed by content, so that the next run on the same texts starts at once.

    CACHE/tokens/<key>/pairs.safetensors

`<key>` is a hash of everything that makes the token ids what they are: the texts in their order, the tokenizer (its
model, template and special tokens, never its name), the lengths, and the code that encodes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from preftree.data import chat, encode, record
from preftree.data.encode import EncodedPair, EncodeReport, encode_pairs
from preftree.data.record import PreferencePair
from preftree.io.atomic import atomic_path
from preftree.io.cache import cache_root


def remembered_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    afresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[EncodedPair], EncodeReport, bool]:
    """`encode_pairs`, from the cache folder where the same was encoded before, else put there.

    Args:
        afresh: encode even what is in the cache.

    Returns:
        the pairs, the report of their encoding, and whether they came from the cache.
    """
    key = content_key(pairs, tokenizer, max_length, max_prompt_length)
    file = cache_root() / "tokens" / key / "pairs.safetensors" if key else None
    if file is not None and not afresh:
        try:
            return *_read(file), True
        except (OSError, SafetensorError, KeyError, ValueError):  # not there, or damaged: encoded again
            pass
    encoded, report = encode_pairs(
        pairs, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, progress=progress
    )
    if file is not None:
        _write(file, encoded, report)
    return encoded, report, False


def content_key(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> str | None:
    """Hash of what decides the token ids; None for a tokenizer that cannot be written down (a slow one)."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    digest = xxhash.xxh3_128()
    for module in (encode, chat, record):
        digest.update(Path(module.__file__ or "").read_bytes())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    made_of = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, special, max_length, max_prompt_length)
    digest.update(json.dumps(made_of, sort_keys=True, default=str).encode())
    for pair in pairs:
        turns = [(turn.role, turn.content) for turn in pair.turns]
        digest.update(json.dumps([pair.system, turns, pair.chosen, pair.rejected, pair.row, pair.source]).encode())
    return digest.hexdigest()


def _write(file: Path, pairs: Sequence[EncodedPair], report: EncodeReport) -> None:
    """Beside the final name, then renamed: a kill leaves no half of a file. A full disk costs the cache only."""
    sides = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    flat = [token for side in sides for ids in side for token in ids]
    arrays: dict[str, Any] = {
        "ids": np.array(flat, dtype=np.int32),
        "lengths": np.array([[len(ids) for ids in side] for side in sides], dtype=np.int32).reshape(-1, 3),
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
        said = content.metadata()
    sides = [tuple(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    columns = (sides[0::3], sides[1::3], sides[2::3], rows, json.loads(said["sources"]))
    pairs = [EncodedPair(*row) for row in zip(*columns, strict=True)]
    report = EncodeReport(**json.loads(said["report"]))
    report.dropped, report.events = Counter(report.dropped), Counter(report.events)
    return pairs, report
