"""Answers to requests on disk, so that a killed evaluation goes on where it stopped.

    CACHE/answers/<model>/<process>.jsonl     ["<hash of the request>", answer], one a line

`<model>` is a hash of everything that an answer depends on besides the request's text: weights and adapter, dtype,
tokenizer, longest input. Each process writes a file of its own, line by line; a line torn by a kill is skipped.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from preftree.io.jsonl import append_jsonl, read_jsonl
from preftree.model.digest import add_model


class RequestCache:
    """What a model answered, by request. It is a `CacheHook` to lm-eval: `add_partial` is called as answers come.

    Args:
        folder: of one model (see `model_key`), made when the first answer is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Any] = {}
        self._path = folder / f"{uuid.uuid4().hex}.jsonl"
        for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
            self._known.update(_read(path))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any | None:
        """The answer under a `request_key`, None if there is none yet."""
        return self._known.get(key)

    def add_partial(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        """Remember an answer, on disk at once."""
        key = request_key(kind, arguments)
        if key in self._known or sampled(arguments):
            return
        self._known[key] = answer
        append_jsonl(self._path, [key, answer])


def model_key(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """Hash of all weights (adapters too), their dtype, the config without names of places, and `settings`."""
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    add_model(digest, model.config, sorted(model.state_dict().items()))  # type: ignore[arg-type]
    return digest.hexdigest()


def request_key(kind: str, arguments: Iterable[Any]) -> str:
    """Hash of a request: lm-eval's name of its kind, and its arguments."""
    return xxhash.xxh3_128_hexdigest(json.dumps([kind, *arguments], sort_keys=True, default=str).encode())


def sampled(arguments: Iterable[Any]) -> bool:
    """Is a new answer wanted each time?"""
    return any(isinstance(part, Mapping) and part.get("do_sample") for part in arguments)


def _read(path: Path) -> dict[str, Any]:
    found = {}
    for key, answer in read_jsonl(path, skip_damaged=True):
        found[key] = tuple(answer) if isinstance(answer, list) else answer
    return found
