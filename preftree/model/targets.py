"""What "all-linear" means: every linear layer that PEFT and the model can adapt, and the experts of mixtures.

A linear layer can be adapted if the model calls it with one tensor, takes one tensor of its width back, and a gradient
reaches it; whether that is so is seen in a pass over a few tokens. Routers that return tuples, layers whose weight is
used without calling them, and those that only choose what others attend to drop out that way. Experts stored as one
tensor (experts, out, in) are no layers; PEFT adapts such parameters by name (`target_parameters`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftree.model.structure import is_recurrent

LINEAR = (nn.Linear, Conv1D)
#: Model types whose layers of these names PEFT refuses: fused kernels read their weights (`peft.tuners.tuners_utils`).
_REFUSED_BY_PEFT = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d"))
_CONVOLUTION = nn.modules.conv._ConvNd
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass
class Targets:
    """Names for PEFT, and what is left out.

    Args:
        modules: full names of linear layers.
        parameters: full names of stacked experts' weights.
        skipped: reason → full names of the linear layers and experts that cannot be adapted for it.
        skipped_weights: number of weights in them.
    """

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    skipped_weights: int = 0

    def skip(self, name: str, weights: int, reason: str) -> None:
        """Leave out a layer or parameter of that many weights."""
        self.skipped[reason].append(name)
        self.skipped_weights += weights

    def notes(self) -> list[str]:
        """A line on what is not adapted, one per reason; empty if everything is."""
        return [
            f"not adapted: {', '.join(_roles(names))} ({len(names)} in all): {reason}"
            for reason, names in self.skipped.items()
        ]


def all_linear(model: PreTrainedModel, dropout: float = 0.0) -> Targets:
    """Everything in `model` that LoRA can adapt, except for the head.

    Args:
        dropout: LoRA's; PEFT cannot apply it to experts stored as one tensor.
    """
    found = Targets()
    head = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR) and m is not head}
    calls = _watch(model, layers)
    refused = _REFUSED_BY_PEFT.get(model.config.model_type, ())
    for name, layer in layers.items():
        last, weights = name.rpartition(".")[2], sum(p.numel() for p in layer.parameters())
        if last in refused:
            found.skip(name, weights, f"PEFT refuses it in models of type {model.config.model_type}")
        elif reason := calls[_role(name)]:
            found.skip(name, weights, reason)
        else:
            found.modules.append(name)
    for name, weight in _stacked_experts(model):
        if is_recurrent(model.get_submodule(name.rpartition(".")[0])):
            found.skip(name, weight.numel(), "it is part of a recurrence, whose state PEFT would hide")
        elif dropout:
            found.skip(name, weight.numel(), "PEFT cannot apply --lora_dropout to stacked experts")
        else:
            found.parameters.append(name)
    return found


def _stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of shape (experts, in, out) or (experts, out, in), by name."""
    for name, module in model.named_modules():
        if not isinstance(module, _CONVOLUTION):
            for own, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3 and min(weight.shape) > 1 and weight.is_floating_point():
                    yield f"{name}.{own}", weight


def _watch(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, str]:
    """For each role (a layer's name without indices) why it cannot be adapted, '' if it can.

    By role, because an expert to which no token was routed is not called although its neighbours are.
    """
    watch = _Watch()
    hooks = [
        layer.register_forward_hook(partial(watch.note_call, _role(name)), with_kwargs=True)
        for name, layer in layers.items()
    ]
    training = model.training
    model.eval()
    try:
        ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            watch.note_gradients(logits.float().square().sum())
    except Exception:  # cannot be run on token ids alone: `attach` says so; here names and types are all there is
        return dict.fromkeys(map(_role, layers), "")
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    unused = "the model reads its weight without calling it"
    return {_role(name): watch.refusals.get(_role(name), unused) for name in layers}


class _Watch:
    """Looks at each call of a layer in a forward pass, and whether a gradient comes back to it."""

    def __init__(self) -> None:
        self.refusals: dict[str, str] = {}
        self.zeros: list[tuple[str, Tensor]] = []

    def note_call(
        self, role: str, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> Tensor | None:
        """A forward hook: what a LoRA layer would add is put in as a zero that wants a gradient."""
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.nf
        if not (isinstance(output, Tensor) and output.shape[-1] == width):
            self.refusals[role] = f"{type(layer).__name__} returns more than its product"
            return None
        if len(inputs) != 1 or keywords:
            self.refusals[role] = f"{type(layer).__name__} is called with more than one input"
            return None
        self.refusals.setdefault(role, "")
        zero = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        self.zeros.append((role, zero))
        return output + zero

    def note_gradients(self, loss: Tensor) -> None:
        """Refuse roles whose output the loss does not depend on differentiably (it selects what others attend to)."""
        gradients = torch.autograd.grad(loss, [zero for _, zero in self.zeros], allow_unused=True)
        reached = {role for (role, _), gradient in zip(self.zeros, gradients, strict=True) if gradient is not None}
        for role, refusal in self.refusals.items():
            if not refusal and role not in reached:
                self.refusals[role] = "no gradient reaches it"


def _role(name: str) -> str:
    return _INDEX.sub("*", name)


def _roles(names: Iterable[str]) -> list[str]:
    """Names with layer numbers left out, each once: 'layers.*.mlp.gate'."""
    return list(dict.fromkeys(map(_role, names)))
