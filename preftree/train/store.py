"""Log-probs on disk, keyed by content, shared by runs.

    CACHE/reference/<weights>/<shard>.safetensors

`<weights>` is a hash of everything that makes the reference model what it is: weights, dtype and config, never
its name. A shard holds the log-probs of many answers. Shards are written beside the final name and renamed, and
no two processes share one, so several runs at once and a kill at any moment leave only whole shards behind.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from transformers import PreTrainedModel

from preftree.io.atomic import atomic_path
from preftree.model.digest import add_model

#: Length of a key.
KEY_BYTES = 16
#: New answers after which a shard is written. A kill loses fewer than that.
SHARD_ANSWERS = 256


def weights_key(model: PreTrainedModel) -> str:
    """Hash of a model's own weights (adapters left out), their dtype, and its config without names of places."""
    digest = xxhash.xxh3_128()
    named = sorted(model.named_parameters())
    # LoRA wraps a layer as `base_layer`; the weight is the same one.
    own = ((name.replace(".base_layer", ""), weight) for name, weight in named if ".lora_" not in name)
    add_model(digest, model.config, own)
    return digest.hexdigest()


class LogprobStore(Mapping[bytes, Tensor]):
    """Answers' per-token log-probs (float32) under 16-byte keys: what the shards of a folder hold, and more.

    Args:
        folder: of one set of weights; made when the first shard is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[bytes, Tensor] = {}
        self._unwritten: dict[bytes, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
            try:
                self._known.update(_read(shard))
            except (SafetensorError, KeyError, OSError):  # not one of ours, or damaged: computed again
                continue

    def __getitem__(self, key: bytes) -> Tensor:
        return self._known[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, key: bytes, token_S: Tensor) -> None:
        """Remember an answer; it is on disk after the next `flush`, which comes by itself now and then."""
        self._known[key] = self._unwritten[key] = token_S.detach().float().cpu()
        if len(self._unwritten) >= SHARD_ANSWERS:
            self.flush()

    def flush(self) -> None:
        """Write what is new as one shard."""
        if not self._unwritten:
            return
        with atomic_path(self.folder / f"{uuid.uuid4().hex}.safetensors") as temporary:
            save_file(_content(self._unwritten), temporary)
        self._unwritten.clear()


def to_bytes(answers: Mapping[bytes, Tensor]) -> Tensor:
    """Answers as bytes (uint8), for another rank."""
    return torch.frombuffer(bytearray(save(_content(answers))), dtype=torch.uint8)


def from_bytes(content: Tensor) -> dict[bytes, Tensor]:
    """What `to_bytes` was given."""
    return _answers(load(content.numpy().tobytes()))


def _read(shard: Path) -> dict[bytes, Tensor]:
    return _answers(load_file(shard))


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
