"""What a training run left, opened again: its adapter or model, the model below it, and the tokenizer.

A run folder alone is enough: the adapter's own config says which model is below it, and where that place is gone, the
settings in `run/config.json` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preftree.errors import ModelError, did_you_mean
from preftree.io.jsonl import read_object
from preftree.model.load import ModelSource, load_model, load_tokenizer, resolve, resolve_tokenizer
from preftree.model.lora import load_adapter

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TrainedRun:
    """A run's parts by name.

    Args:
        folder: with the adapter, or with the whole model.
        base: the model below the adapter, or the one to compare a whole model with; None where nobody knows.
        adapter: whether `folder` holds an adapter.
        settings: of the run, by group, as its `run/config.json` has them; empty for an adapter made elsewhere.
    """

    folder: Path
    base: str | None
    adapter: bool
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def base_source(self) -> ModelSource:
        """Where the base is loaded from. Raises ModelError where it is unknown or gone."""
        if self.base is None:
            raise ModelError(
                f"{self.folder} is a whole model, and what it was trained from is not recorded: name it by --model."
            )
        return resolve(self.base)

    @property
    def base_name(self) -> str:
        """The base as the run's command named it, for people; else where it is loaded from."""
        return str(self.group("model").get("model_name_or_path") or self.base or "")

    def group(self, name: str) -> Mapping[str, Any]:
        """One group of the run's settings."""
        found = self.settings.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def hub_options(self) -> dict[str, Any]:
        """What the loaders need to find the base on the hub."""
        model = self.group("model")
        token = True if model.get("use_auth_token") else None
        return {"revision": model.get("model_revision") or "main", "cache_dir": model.get("cache_dir"), "token": token}

    @property
    def tokenizer_source(self) -> ModelSource:
        """The run's own tokenizer, else its base's."""
        if any((self.folder / name).is_file() for name in _TOKENIZER):
            return resolve_tokenizer(str(self.folder))
        return self.base_source

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the chat template that the run was trained with."""
        return load_tokenizer(self.tokenizer_source, **self.hub_options)


def find_run(name: str, base: str | None = None) -> TrainedRun:
    """The run in a folder.

    Args:
        name: an output folder of `preftree train`, one of its checkpoints, any PEFT adapter, or a whole model.
        base: the model below, where another one than the recorded one is meant.

    Raises:
        ModelError: there is neither an adapter nor a model.
    """
    folder = Path(name)
    if not folder.is_dir():
        near = did_you_mean(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise ModelError(f"{name}: no such folder.{near} Give the output folder of a run.")
    settings = _settings(folder) or _settings(folder.parent)
    if (folder / "adapter_config.json").is_file():
        return TrainedRun(folder, base or _base_of(folder, settings), True, settings)
    if (folder / "config.json").is_file() and next(folder.glob("*.safetensors"), None):
        return TrainedRun(folder, base, False, settings)
    checkpoints = sorted(folder.glob("checkpoint-*/adapter_config.json"), key=lambda path: path.stat().st_mtime)
    hint = f" Its newest checkpoint is {checkpoints[-1].parent}." if checkpoints else ""
    raise ModelError(
        f"{name} holds neither an adapter (adapter_config.json) nor a model: give the output folder of a run that has "
        f"finished, or one of its checkpoints.{hint}"
    )


def _settings(folder: Path) -> Mapping[str, Any]:
    settings = read_object(folder / "run" / "config.json").get("settings")
    return settings if isinstance(settings, dict) else {}


def _base_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The base that an adapter's config records, or the one that its run's settings name where that is gone."""
    recorded = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    model = settings.get("model")
    named = model.get("model_name_or_path") if isinstance(model, dict) else None
    if recorded and (Path(recorded).is_dir() or not Path(recorded).is_absolute()):
        return str(recorded)
    return str(named or recorded) if named or recorded else None


class ModelPair:
    """A base model and what training made of it, under one tokenizer.

    Args:
        base, trained: one `PeftModel` for both, or two models.
    """

    def __init__(self, base: PreTrainedModel | PeftModel, trained: PreTrainedModel | PeftModel) -> None:
        self._base, self._trained = base, trained

    @contextmanager
    def side(self, name: str) -> Iterator[PreTrainedModel | PeftModel]:
        """The model called `base` or `trained`, for a block."""
        if name == "trained":
            yield self._trained
        elif self._base is self._trained and isinstance(self._base, PeftModel):
            with self._base.disable_adapter():
                yield self._base
        else:
            yield self._base


def open_pair(run: TrainedRun, device: str, dtype: torch.dtype) -> ModelPair:
    """Load a run's base and what was trained, once each.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    base = load_model(run.base_source, dtype, **run.hub_options).to(device)
    if run.adapter:
        adapted = load_adapter(base, str(run.folder))
        return ModelPair(adapted, adapted)
    return ModelPair(base, load_model(resolve(str(run.folder)), dtype).to(device))


def open_trained(run: TrainedRun, device: str, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    """Load what was trained alone. Raises ModelError where it cannot be loaded."""
    if not run.adapter:
        return load_model(resolve(str(run.folder)), dtype).to(device)
    return load_adapter(load_model(run.base_source, dtype, **run.hub_options).to(device), str(run.folder))
