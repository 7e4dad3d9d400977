"""Log-probs on disk, keyed by content, shared by runs.

    CACHE/reference/<scoring>/<shard>.safetensors

`<scoring>` is a hash of everything that decides a log-prob besides the tokens (`scoring_key`): the weights, buffers,
dtype and config of the reference model, never its name; the path it is scored by; and the versions of the code that
scores. A shard holds the log-probs of many answers and a checksum of them. Shards are replaced atomically, and no two
processes share one, so several runs at once and a kill at any moment leave only whole shards behind.

A cache that cannot be written, or is damaged, costs time and nothing else.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

import preftree
from preftree.io.atomic import atomic_file
from preftree.model.digest import add_model
from preftree.model.score import Scorer

_log = logging.getLogger(__name__)

#: Length of a key.
KEY_BYTES = 16
#: New answers after which a shard is written. A kill loses fewer than that.
SHARD_ANSWERS = 256


#: Sources that decide a log-prob, as folders of the package.
_SCORING = ("forest", "model")
#: Fields of a PEFT config that say where something is and not what it is.
_PLACES = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def weights_key(model: nn.Module) -> str:
    """Hash of a model's weights and buffers, their dtypes, and its config without names of places.

    Args:
        model: a causal language model, whose LoRA layers are left out; or a PEFT model around one, whose active
            adapters count with their configs.
    """
    digest = xxhash.xxh3_128()
    tensors = dict(model.state_dict())
    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            settings = {k: v for k, v in model.peft_config[name].to_dict().items() if k not in _PLACES}
            digest.update(json.dumps([name, settings], sort_keys=True, default=_listed).encode())
    else:  # LoRA wraps a layer as `base_layer`; the weight is the same one
        tensors = {name.replace(".base_layer", ""): x for name, x in tensors.items() if ".lora_" not in name}
    add_model(digest, model.config, sorted(tensors.items()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def scoring_key(weights: str, scorer: Scorer) -> str:
    """Hash of all that decides reference log-probs besides the tokens.

    Args:
        weights: of the reference model (`weights_key`, and that of an adapter if it has one).
        scorer: what they are computed by.
    """
    made_of = [
        weights,
        scorer.name,
        scoring_version(),
        _own_code(scorer.causal),
        *(f"{name} {version(name)}" for name in ("torch", "transformers")),
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(made_of).encode())


def _own_code(model: nn.Module) -> str:
    """Hash of the module that defines a model class which is not transformers' own: a script's, or one from the hub."""
    module = sys.modules.get(type(model).__module__)
    if module is None or type(model).__module__.startswith("transformers."):
        return ""
    try:
        return xxhash.xxh3_128_hexdigest(inspect.getsource(module).encode())
    except (OSError, TypeError):  # written on the fly: nobody else's answers are taken for its own
        return uuid.uuid4().hex


@lru_cache(maxsize=1)
def scoring_version() -> str:
    """Hash of this package's sources that compute log-probs: whatever a fix of them changes is computed again."""
    root, digest = Path(preftree.__file__).parent, xxhash.xxh3_128()
    for folder in _SCORING:
        for source in sorted((root / folder).rglob("*")):
            if source.suffix in (".py", ".cpp", ".h"):
                digest.update(f"{source.relative_to(root).as_posix()}\n".encode())
                digest.update(source.read_bytes())
    return digest.hexdigest()


class LogprobStore(Mapping[bytes, Tensor]):
    """Answers' per-token log-probs (float32) under 16-byte keys: those in a folder's shards, and new ones.

    Args:
        folder: of one `scoring_key`; made when the first shard is written.
        say: what the user is told if the folder cannot be used, once.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = _log.warning) -> None:
        self.folder, self.say = folder, say
        self._known: dict[bytes, Tensor] = {}
        self._unwritten: dict[bytes, Tensor] = {}
        self._writable = True
        for shard in _shards(folder):
            try:
                self._known.update(_read(shard))
            except OSError:  # it may be readable later
                continue
            except (SafetensorError, RuntimeError, ValueError):
                _remove(shard)  # torn or damaged: its answers are computed again

    def __getitem__(self, key: bytes) -> Tensor:
        return self._known[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, key: bytes, token_S: Tensor) -> None:
        """Remember an answer. It is on disk after the next `flush`, which happens by itself every few hundred."""
        value_S = token_S.detach().float().cpu()
        self._known[key] = value_S
        if bool(torch.isfinite(value_S).all()):
            self._unwritten[key] = value_S
        if len(self._unwritten) >= SHARD_ANSWERS:
            self.flush()

    def flush(self) -> None:
        """Write what is new as one shard. Where that is impossible the user is told and nothing is written any more."""
        if self._unwritten and self._writable:
            content = _content(self._unwritten)
            try:
                with atomic_file(self.folder / f"{uuid.uuid4().hex}.safetensors") as file:
                    file.write(save(content, metadata={"checksum": _checksum(content)}))
            except OSError as problem:
                self._writable = False
                self.say(
                    f"reference log-probs cannot be kept in {self.folder} ({problem.strerror or problem}): this run "
                    "goes on, and later runs compute them again. PREFTREE_CACHE names another folder"
                )
        self._unwritten.clear()

    def discard(self) -> None:
        """Forget what was read, on disk as well: a new computation disagrees with it."""
        for shard in _shards(self.folder):
            _remove(shard)
        self._known = dict(self._unwritten)
        self.say(
            f"the reference log-probs in {self.folder} differ from what the model gives now: they are discarded and "
            "computed again"
        )


def to_bytes(answers: Mapping[bytes, Tensor]) -> Tensor:
    """Serialize answers as uint8, for another rank."""
    return torch.frombuffer(bytearray(save(_content(answers))), dtype=torch.uint8)


def from_bytes(content: Tensor) -> dict[bytes, Tensor]:
    """The inverse of `to_bytes`."""
    return _answers(load(content.numpy().tobytes()))


def _read(shard: Path) -> dict[bytes, Tensor]:
    """The answers in a shard; raises ValueError if they are not those that were written."""
    with safe_open(shard, framework="pt") as file:
        content = {name: file.get_tensor(name) for name in ("keys", "lengths", "logprobs")}
        checksum = (file.metadata() or {}).get("checksum")
    if checksum != _checksum(content):
        raise ValueError(f"{shard}: its content is not what was written")
    return _answers(content)


def _checksum(content: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(content.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shards(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.safetensors"))
    except OSError:
        return []


def _remove(shard: Path) -> None:
    with suppress(OSError):
        shard.unlink()


def _content(answers: Mapping[bytes, Tensor]) -> dict[str, Tensor]:
    values = list(answers.values())
    return {
        "keys": torch.frombuffer(bytearray(b"".join(answers)), dtype=torch.uint8).view(-1, KEY_BYTES)
        if values
        else torch.empty(0, KEY_BYTES, dtype=torch.uint8),
        "lengths": torch.tensor([len(value) for value in values], dtype=torch.int64),
        "logprobs": torch.cat(values) if values else torch.empty(0),
    }


def _answers(content: Mapping[str, Tensor]) -> dict[bytes, Tensor]:
    values = content["logprobs"].split(content["lengths"].tolist())
    return {bytes(key.tolist()): value for key, value in zip(content["keys"], values, strict=True)}
