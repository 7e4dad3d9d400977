"""The cache folder: what may be deleted at any time and is made again when it is needed.

    CACHE/reference/    reference log-probs, by weights and token ids (train/store.py)
    CACHE/answers/      what models answered to evaluation requests (evaluate/cache.py)
    CACHE/models/       GGUF models as transformers loads them fast, by content (model/load.py)
    CACHE/tokens/       encoded pairs, by texts, tokenizer and lengths (data/tokens.py)
    CACHE/kernels/      compiled kernels, by source, compiler and processor (model/cpu/kernels)

CACHE is PREFTREE_CACHE, else `preftree` in the user's cache folder. What is made in it is for this user alone.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from preftree.io.private import make_private


def cache_root() -> Path:
    """The folder of all caches; it need not exist yet."""
    if own := os.environ.get("PREFTREE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preftree"


def cache_folder(part: str) -> Path:
    """The folder of one cache, made where it can be: whoever writes there finds out whether it could."""
    folder = cache_root() / part
    with suppress(OSError):
        make_private(folder)
    return folder


PARTS = ("answers", "reference", "models", "tokens", "kernels")


@dataclass(frozen=True)
class CachePart:
    """One cache: its entries (sets of weights, models, data sets, builds), files and bytes."""

    name: str
    entries: int
    files: int
    size: int


def cache_parts() -> list[CachePart]:
    """What the caches hold, by name."""
    root = cache_root()
    parts = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        files = [path for path in folder.rglob("*") if path.is_file()]
        entries = sum(1 for entry in folder.iterdir() if entry.is_dir())
        parts.append(CachePart(folder.name, entries, len(files), sum(path.stat().st_size for path in files)))
    return parts


def clear_cache() -> list[CachePart]:
    """Delete the caches; returns what they held. Nothing else in the folder is touched."""
    parts = [part for part in cache_parts() if part.name in PARTS]
    for part in parts:
        shutil.rmtree(cache_root() / part.name)
    return parts
