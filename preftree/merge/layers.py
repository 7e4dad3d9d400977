"""What an adapter makes of each tensor of its base model, one layer in memory at a time.

PEFT itself merges, so whatever it can merge is merged here: the model is built with parameters that take no memory and
the adapter's own weights; one layer after another gets its base weights in float32, is merged, and is emptied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from preftree.errors import ModelError
from preftree.merge.shards import BaseShards
from preftree.model.lora import fit_vocabulary, without_chatter

_ADAPTER = "default"


class NotByLayer(Exception):
    """The adapter or the base's files need the whole model in memory; the text says why."""


class MergedLayers:
    """The tensors of a base model with an adapter merged in, by the names of the base's files.

    Args:
        shards: the base's files.
        adapter: folder of the adapter.

    Raises:
        NotByLayer: names in the files are not those of the model, or the adapter has parts that belong to no one layer.
        ModelError: the adapter does not fit the model.
    """

    def __init__(self, shards: BaseShards, adapter: Path) -> None:
        self.shards, self.adapter = shards, adapter
        config = AutoConfig.from_pretrained(shards.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            fit_vocabulary(model, str(adapter))
        self._hollow = _hollow_out(model)
        self.names = set(model.state_dict())
        self.tied = _tied_names(model)
        if strange := sorted(set(shards.names) - self.names):
            raise NotByLayer(f"the base's files name their tensors otherwise than the model does ({strange[0]})")
        peft = _with_adapter(model, adapter, self.names)
        self.config = model.config
        self._groups: dict[str, nn.Module] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._find(peft)
        self._done: dict[str, Tensor] = {}
        self.changed = sorted({*self._groups, *self._replaced()})
        self._untie()

    def _find(self, peft: PeftModel) -> None:
        """Which layer merges each changed tensor, and where each tensor lies in the model with the adapter."""
        inner = peft.get_base_model()
        for path, module in inner.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
                raise NotByLayer(f"{path} trains single tokens")
            for name, _ in module.named_parameters(recurse=False):
                own = _own_name(f"{path}.{name}")
                if own in self.names and (own not in self._places or "modules_to_save" in path):
                    self._places[own] = (module, name)
        outer = ""
        for path, module in inner.named_modules():
            if isinstance(module, BaseTunerLayer) and not (outer and path.startswith(f"{outer}.")):
                outer = path
                for name, _ in module.named_parameters():
                    own = _own_name(f"{path}.{name}")
                    if own in self.names:
                        self._groups[own] = module

    def _replaced(self) -> Iterator[str]:
        """Tensors that the adapter brings as a whole: modules_to_save, biases, embeddings of another vocabulary."""
        for own, (module, name) in self._places.items():
            if id(getattr(module, name)) not in self._hollow:
                yield own

    def _untie(self) -> None:
        """An adapter that changes one of two tied tensors makes two of them."""
        if any(name in self.changed for names in self.tied.items() for name in names):
            values = [self.get(name) for names in self.tied.items() for name in names]
            pairs = zip(values[::2], values[1::2], strict=True)
            if not all(first.shape == second.shape and torch.equal(first, second) for first, second in pairs):
                self.config.tie_word_embeddings = False
                self.config.get_text_config().tie_word_embeddings = False

    @property
    def extra(self) -> list[str]:
        """Tensors that the merged model has and the base's files have not."""
        untied = not self.config.get_text_config().tie_word_embeddings
        return sorted(name for name in self.tied if untied and name not in self.shards.names)

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of the merged model in `dtype`."""
        return self.shards.size() * dtype.itemsize // self.shards.dtype().itemsize

    def get(self, name: str) -> Tensor:
        """A tensor as the merged model has it; in float32 where it was merged."""
        if name in self._done:
            return self._done.pop(name)
        if name in self._groups:
            merged = self._merge(self._groups[name])
            self._done = {other: tensor for other, tensor in merged.items() if other != name}
            return merged[name]
        return self._value(name)

    def _value(self, name: str) -> Tensor:
        """A tensor before merging: the adapter's own, or the base's."""
        module, attribute = self._places.get(name, (None, ""))
        own = getattr(module, attribute) if module is not None else None
        if own is not None and id(own) not in self._hollow:
            return own.detach()
        return self.shards.get(name if name in self.shards.names else self.tied.get(name, name))

    def _merge(self, layer: nn.Module) -> dict[str, Tensor]:
        names = [name for name, owner in self._groups.items() if owner is layer]
        empty = {}
        try:
            for name in names:
                module, attribute = self._places[name]
                value = self._value(name)
                empty[name] = getattr(module, attribute)
                wide = value if value.dtype == torch.float64 else value.float()
                setattr(module, attribute, nn.Parameter(wide.clone(), requires_grad=False))
            for part in reversed([part for part in layer.modules() if isinstance(part, BaseTunerLayer)]):
                part.merge(safe_merge=True)
                part.merged_adapters.clear()
            return {name: getattr(*self._places[name]).detach() for name in names}
        except ValueError as problem:  # PEFT found values that are not finite
            raise ModelError(f"the adapter {self.adapter} cannot be merged: {names[0]}: {problem}") from problem
        finally:
            for name, parameter in empty.items():
                module, attribute = self._places[name]
                setattr(module, attribute, parameter)


def _own_name(path: str) -> str:
    """The name that a parameter had before PEFT wrapped its module."""
    for inserted in (".base_layer", f".modules_to_save.{_ADAPTER}", ".original_module"):
        path = path.replace(inserted, "")
    return path


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of tensors that are another one's, with that one's name; empty where nothing is tied."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    modules = {id(module): name for name, module in model.named_modules()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or id(head) not in modules:
        return {}
    return {f"{modules[id(head)]}.weight": f"{modules[id(embeddings)]}.weight"}


def _hollow_out(model: nn.Module) -> dict[int, nn.Parameter]:
    """Put a parameter of the same shape that takes no memory in place of each one; returns them by their id.

    Not on the meta device, where PEFT would move the adapter's own weights and lose them.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hollow = nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False)
            module.register_parameter(name, hollow)
            made[id(hollow)] = hollow
    return made


def _with_adapter(model: PreTrainedModel, folder: Path, own: Collection[str]) -> PeftModel:
    """The hollow model with an adapter's weights; `own` are the names of the model's own tensors."""
    try:
        with without_chatter():
            config: Any = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            peft = get_peft_model(model, config, low_cpu_mem_usage=True)
            weights = {name: _wide(tensor) for name, tensor in load_peft_weights(str(folder), "cpu").items()}
            loaded = set_peft_model_state_dict(peft, weights, _ADAPTER, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise ModelError(f"the adapter {folder} does not fit its base model: {first}") from problem
    missing = [n for n, p in peft.get_base_model().named_parameters() if p.is_meta and _own_name(n) not in own]
    if names := [*loaded.unexpected_keys, *missing]:
        raise ModelError(f"the adapter {folder} does not fit its base model: {len(names)} weights, as {names[0]}")
    return peft


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
