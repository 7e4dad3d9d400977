"""Answers to requests on disk, so that a killed evaluation continues where it stopped.

    CACHE/answers/<model>/<process>.jsonl     ["<hash of the request>", answer], one per line

`<model>` is a hash of everything that an answer depends on besides the request's text (see `model_key`). Each process
appends to a file of its own; lines that a kill tore or anything else damaged are skipped. A cache that cannot be read
or written costs the cache, never the evaluation.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
import xxhash
from peft import PeftModel
from torch import Tensor, nn

from preftree.io.jsonl import append_jsonl, read_jsonl
from preftree.model.digest import add_model

#: Raised whenever the same weights and text get another answer than before: what older code stored is then unused.
SCORING_VERSION = 2
#: Fields of an adapter's config that say where its base model was found.
_PLACES = frozenset({"base_model_name_or_path", "revision"})


class RequestCache:
    """What a model answered, by request. It is a `CacheHook` to lm-eval: `add_partial` is called as answers come.

    Args:
        folder: of one model (see `model_key`), made when the first answer is written.
        say: is told once why the cache is not used.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.folder, self._say = folder, say
        self.writes = True
        self._known: dict[str, Any] = {}
        self._path = folder / f"{uuid.uuid4().hex}.jsonl"
        try:
            for path in sorted(folder.glob("*.jsonl")):
                self._known.update(_read(path))
        except OSError as problem:
            self._give_up(problem)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any | None:
        """The answer under a `request_key`, None if there is none yet."""
        return self._known.get(key)

    def learn(self, answers: Mapping[str, Any]) -> None:
        """Know answers that another process wrote."""
        self._known.update(answers)

    def forget(self) -> None:
        """Drop what earlier runs left, here and on disk."""
        self._known.clear()
        try:
            for path in sorted(self.folder.glob("*.jsonl")):
                path.unlink(missing_ok=True)
        except OSError as problem:
            self._give_up(problem)

    def add_partial(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        """Remember an answer, on disk at once."""
        key = request_key(kind, arguments)
        if key in self._known or sampled(arguments):
            return
        self._known[key] = answer
        if not self.writes:
            return
        try:
            append_jsonl(self._path, [key, answer])
        except OSError as problem:
            self._give_up(problem)

    def _give_up(self, problem: OSError) -> None:
        self.writes = False
        if self._say is not None:
            self._say(f"note: answers are not cached: {self.folder}: {problem.strerror or problem}")


def model_key(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """Hash of everything that an answer depends on besides the request's text.

    That is: all weights and buffers with their dtypes, the model's config without names of places, each adapter's
    whole config (its alpha scales what its weights do), `settings`, this code's version and transformers'.
    """
    adapters: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        adapters = {
            name: {k: v for k, v in config.to_dict().items() if k not in _PLACES}
            for name, config in model.peft_config.items()
        }
        adapters["active"] = model.active_adapters
    content = [SCORING_VERSION, transformers.__version__, adapters, settings]
    digest = xxhash.xxh3_128(json.dumps(content, sort_keys=True, default=_plain).encode())
    add_model(digest, model.config, sorted(_tensors(model)))  # type: ignore[arg-type]
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and all buffers, those that are not saved with the model too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _plain(value: Any) -> Any:
    """Sets (PEFT keeps its target modules in one) in an order that does not change from run to run."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def request_key(kind: str, arguments: Iterable[Any]) -> str:
    """Hash of a request: lm-eval's name of its kind, and its arguments."""
    return xxhash.xxh3_128_hexdigest(json.dumps([kind, *arguments], sort_keys=True, default=str).encode())


def sampled(arguments: Iterable[Any]) -> bool:
    """Is a new answer wanted each time?"""
    return any(isinstance(part, Mapping) and part.get("do_sample") for part in arguments)


def _read(path: Path) -> dict[str, Any]:
    found = {}
    for record in read_jsonl(path, skip_damaged=True):
        if isinstance(record, list) and len(record) == 2 and isinstance(record[0], str) and _is_answer(record[1]):
            key, answer = record
            found[key] = tuple(answer) if isinstance(answer, list) else answer
    return found


def _is_answer(value: Any) -> bool:
    """A log-likelihood with is_greedy, the log-likelihood of a whole text, or a generated text."""
    if isinstance(value, list):
        return len(value) == 2 and _is_number(value[0]) and isinstance(value[1], bool)
    return isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
