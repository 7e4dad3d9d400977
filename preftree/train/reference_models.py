"""Which model the reference is: what it computes log-probs with, and until when it can.

    adapter off      a new adapter on a frozen model: the same model with the adapter switched off
    frozen adapter   an adapter that was there before: a copy of it, named "ref" as in TRL
    second model     a model of its own: the user's `ref_model`, a copy, or one that moves (TR-DPO)
    initial weights  full fine-tuning: the policy itself, before its first step; no second model in memory

Adapter-off is the reference only while nothing but the adapter is trained, so anything else (a bias, an embedding
outside PEFT's own copies) falls to the initial weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.model.score import LeafLogprobs, Scorer, evaluating, leaf_logprobs
from preftree.train.config import DPOConfig

#: Name of the frozen copy of an adapter.
REF_ADAPTER = "ref"


class ReferenceModel(Protocol):
    """Computes the reference's log-probs of a forest.

    `described` says in words what it is. A `moving` reference changes while training, so that nothing it computed is
    kept for long. One that is not `lasting` can be asked before the first step only.
    """

    described: str
    moving: bool
    lasting: bool

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, forest: Forest) -> LeafLogprobs: ...


class _OfScorer:
    """Log-probs of an attached model in evaluation mode, with other weights in force where `weights` says so."""

    moving, lasting = False, True

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @property
    def device(self) -> torch.device:
        return self.scorer.causal.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scorer.causal.dtype

    def weights(self) -> AbstractContextManager[object]:
        """Puts the reference's weights in force."""
        return nullcontext()

    def __call__(self, forest: Forest) -> LeafLogprobs:
        with evaluating(self.scorer.model), self.weights():
            return leaf_logprobs(self.scorer, forest)


class AdapterOff(_OfScorer):
    """The policy with its adapter switched off.

    Raises:
        ModelError: weights outside the adapter are trained.
    """

    described = "the model without its adapter"

    def __init__(self, policy: Scorer) -> None:
        super().__init__(policy)
        if foreign := trained_outside_adapter(policy.model):
            raise ModelError(
                f"the reference is the model without its adapter, but {len(foreign)} other weights are trained too "
                f"(first: {foreign[0]}), so switching the adapter off does not give the starting model"
            )

    def weights(self) -> AbstractContextManager[object]:
        assert isinstance(self.scorer.model, PeftModel)
        return self.scorer.model.disable_adapter()


class FrozenAdapter(_OfScorer):
    """The policy with a frozen copy of its adapter (see `freeze_adapter_copy`) in the adapter's place."""

    described = f'a frozen copy of the adapter ("{REF_ADAPTER}")'

    def weights(self) -> AbstractContextManager[object]:
        assert isinstance(self.scorer.model, PeftModel)
        return using_adapter(self.scorer.model, REF_ADAPTER)


class SecondModel(_OfScorer):
    """A model of its own, which shares nothing with the policy.

    Args:
        described: what it is, in words.
        moving: its weights change while training.
    """

    def __init__(self, scorer: Scorer, described: str, moving: bool = False) -> None:
        super().__init__(scorer)
        self.described, self.moving = described, moving


class InitialWeights(_OfScorer):
    """The policy itself before its first step.

    Args:
        started: says whether the policy has been trained since.
    """

    described, lasting = "the model before its first step, no second model in memory", False

    def __init__(self, policy: Scorer, started: Callable[[], bool]) -> None:
        super().__init__(policy)
        self.started = started

    def __call__(self, forest: Forest) -> LeafLogprobs:
        if self.started():
            raise ModelError(
                "Cannot compute reference log-probs for a dataset passed to `evaluate()` after training has started: "
                "with full fine-tuning and without a `ref_model` the reference is the model before its first step. "
                "Provide this dataset as `eval_dataset` at initialization, or pass an explicit `ref_model`."
            )
        return super().__call__(forest)


class MoveReference(TrainerCallback):
    """TR-DPO (arXiv 2404.09656, eq. 4 and 5): r ← α π + (1 − α) r every few steps.

    Args:
        moved: called afterwards.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, moved: Callable[[], None]) -> None:
        self.policy, self.reference, self.moved = policy, reference, moved

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        assert isinstance(args, DPOConfig)
        if state.global_step % args.ref_model_sync_steps:
            return
        for theirs, ours in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
            theirs.lerp_(ours.to(theirs.dtype), args.ref_model_mixup_alpha)
        self.moved()


def freeze_adapter_copy(model: PeftModel) -> None:
    """Add the frozen adapter `ref`, a copy of the active one."""
    active = model.active_adapter
    model.add_adapter(REF_ADAPTER, copy.deepcopy(model.peft_config[active]))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{active}." in name or name.endswith(f".{active}"):
                twin = parameters[name.replace(f".{active}", f".{REF_ADAPTER}")]
                twin.copy_(parameter)
                twin.requires_grad_(False)
    model.set_adapter(active)


@contextmanager
def using_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Another adapter for a while; which weights are trained stays as it was."""
    active = model.active_adapter
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)


def trained_outside_adapter(model: nn.Module) -> list[str]:
    """Names of trained weights that do not go away when the adapter is switched off."""
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name in module.adapter_layer_names
        for parameter in attrgetter(name)(module).parameters()
    }
    return [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in inside]
