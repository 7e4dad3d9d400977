"""The one entry point: `scorer = attach(model)`, then `scorer(forest)`, in training, the reference pass and evaluation.

A model is attached once: a small forest is scored by the path that is likely fastest and by the model's own plain
forward on single sequences. If they differ, or the path cannot run, the next one is tried (see `paths`).

Shape suffixes: S scored tokens, L leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.errors import ModelError, SettingsError, did_you_mean
from preftree.forest import Forest
from preftree.model import families, selfcheck, structure
from preftree.model.attention import BACKENDS, FOR_DEVICE, MEASURED, Rules, timing
from preftree.model.logprob import TokenStats
from preftree.model.patch import Patches, undo_patches
from preftree.model.paths import SEQUENCES, OpenPath, open_path
from preftree.model.selfcheck import SelfCheck


@dataclass(frozen=True, eq=False)
class LeafLogprobs:
    """Log-probs of a forest's scored tokens, in float32 (float64 if the model is).

    Args:
        token_S: log p of each scored token.
        forest: what they were computed over; padding comes after its real tokens and leaves.
    """

    token_S: Tensor
    forest: Forest

    @property
    def leaf_ids(self) -> tuple[int, ...]:
        """The caller's names of the leaves."""
        return self.forest.leaf_ids

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored tokens of each leaf."""
        return self.forest.leaf_lengths

    @property
    def sum_L(self) -> Tensor:
        """log p(continuation | prompt) of each leaf, 0 for padding."""
        return self.forest.sum_by_leaf(self.token_S)

    def by_leaf(self) -> dict[int, Tensor]:
        """Per-token log-probs under the caller's leaf names."""
        parts = self.token_S[: sum(self.lengths)].split(self.lengths)
        return {name: parts[leaf] for name, leaf in zip(self.leaf_ids, self.forest.leaf_of_id, strict=True)}


class Scorer:
    """An attached model: call it with a forest. Made by `attach`; a context manager that closes itself.

    While it is open the model is patched (attention, on a CPU other modules too); plain forwards and `generate` give
    what they gave before. A model is patched for one scorer at a time: one that is used after another patches it anew.

    Args:
        model: as it was given to `attach`.
        name: of the path: a tree backend, "padded" or "plain".
        reason: why this path, and why not those before it.
        check: what it was checked against.
        opener: opens the path.
    """

    def __init__(self, model: nn.Module, name: str, reason: str, check: SelfCheck, opener: PathOpener) -> None:
        self.model, self.causal = model, opener.causal
        self.name, self.reason, self.check = name, reason, check
        self._opener, self._closed = opener, False

    def __call__(self, forest: Forest, stats: TokenStats | None = None) -> LeafLogprobs:
        """Log-probs of every continuation in `forest`, which is on the model's device; differentiable.

        Args:
            stats: statistics of the scored tokens, filled in if given.

        Raises:
            ModelError: this scorer was closed.
        """
        return LeafLogprobs(self.path.score(forest, stats), forest)

    @property
    def path(self) -> OpenPath:
        """What scores.

        Raises:
            ModelError: this scorer was closed.
        """
        if self._closed:
            raise ModelError(f"this scorer of {type(self.causal).__name__} was closed; attach the model again")
        return self._opener.open(self.name)

    @property
    def shares_prompts(self) -> bool:
        """Is every prompt computed once, or does each answer carry its own copy of it?"""
        return self.name not in SEQUENCES

    def close(self) -> None:
        """Put the model back as it was before `attach`; the second time does nothing."""
        self._closed = True
        self._opener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def leaf_logprobs(scorer: Scorer, forest: Forest) -> LeafLogprobs:
    """Log-probs of every continuation in `forest` under an attached model, differentiable (see `Scorer`)."""
    return scorer(forest)


def attach(model: nn.Module, attention: str = "auto", *, fixed_shapes: bool = False, room: int | None = None) -> Scorer:
    """Choose how `model` is scored and check that choice against its plain forward.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        attention: "auto", a tree backend's name, "padded" or "plain". A named path that fails its check
            falls back too; the reason says so.
        fixed_shapes: "auto" means the backend whose operations do not depend on the forest's contents.
        room: free bytes on the CPU, of which a part may go to packed weights; None packs none.

    Raises:
        SettingsError: unknown name.
        ModelError: no path agrees with the model itself.
    """
    causal = causal_model(model)
    undo_patches(causal)
    candidates, refused = _candidates(causal, attention, fixed_shapes)
    opener = PathOpener(causal, selfcheck.own_attention(causal), room)
    with evaluating(causal):
        check = selfcheck.of_model(causal)
        agreed, failed = _check(opener, candidates, check)
        refusals = [*refused, *failed]
        if not agreed:
            raise ModelError(
                f"{type(causal).__name__}: no way of scoring agrees with the model's own forward: {'; '.join(refusals)}"
            )
        times = _time(causal, tuple(agreed))
        name = timing.fastest(times) if times else next(iter(agreed))
        path = opener.open(name)
    agreement = f"agrees with the model's plain forward to {agreed[name]:.1g}"
    reason = "; ".join(filter(None, [*refusals, timing.described(times), agreement, path.note]))
    return Scorer(model, name, reason, check, opener)


class PathOpener:
    """Patches a model for one path at a time.

    Args:
        stock: the model's own attention.
        room: free bytes for packed weights.
    """

    def __init__(self, causal: PreTrainedModel, stock: str, room: int | None) -> None:
        self.causal, self.stock, self.room = causal, stock, room
        self._patches = Patches(causal)
        self._open: tuple[str, OpenPath] | None = None

    def open(self, name: str) -> OpenPath:
        """Patch the model for a path, unless it is, after what it was patched for before is put back."""
        if self._open is None or self._open[0] != name or self._patches.undone:
            self.close()
            undo_patches(self.causal)
            self._patches = Patches(self.causal)
            with evaluating(self.causal):
                self._open = name, open_path(self.causal, name, self.stock, self._patches, self.room)
        return self._open[1]

    def close(self) -> None:
        """Put the model back as it was."""
        self._open = None
        self._patches.undo()


def _candidates(causal: PreTrainedModel, attention: str, fixed_shapes: bool) -> tuple[list[str], list[str]]:
    """Step 1: the paths to try, the likely fastest first, those through single sequences last; and refusals.

    Raises:
        SettingsError: unknown name.
    """
    known = ("auto", *BACKENDS, *SEQUENCES)
    if attention not in known:
        raise SettingsError(f"--attention {attention}: choose from {', '.join(known)}.{did_you_mean(attention, known)}")
    if attention in SEQUENCES:
        wanted = SEQUENCES[SEQUENCES.index(attention) :]
    elif attention != "auto":
        wanted = (attention, *SEQUENCES)
    else:
        trees = ("masked",) if fixed_shapes else FOR_DEVICE.get(causal.device.type, ("masked",))
        wanted = (*(name for name in trees if BACKENDS[name].computes_in(causal.dtype)), *SEQUENCES)
    reasons = structure.refusals(causal)
    kinds = {name: name if name in SEQUENCES else "trees" for name in wanted}
    refused = {kinds[name]: reasons[kinds[name]] for name in wanted if kinds[name] in reasons}
    return [name for name in wanted if kinds[name] not in refused], [f"{what}: {why}" for what, why in refused.items()]


def _check(opener: PathOpener, candidates: Sequence[str], check: SelfCheck) -> tuple[dict[str, float], list[str]]:
    """Step 2: which paths agree with the model and to how many nats, and why others do not.

    Ends with the first that agrees, or with the last tree where trees are timed.
    """
    agreed: dict[str, float] = {}
    refusals: list[str] = []
    for name in candidates:
        if agreed and (name in SEQUENCES or opener.causal.device.type not in MEASURED):
            break
        try:
            error = check.error(opener.open(name).score)
        except Exception as problem:  # whatever a foreign model does, the next path may still work
            opener.close()
            refusals.append(f"{name}: {type(problem).__name__}: {problem}".splitlines()[0])
            continue
        if error <= check.tolerance:
            agreed[name] = error
        else:
            opener.close()
            refusals.append(f"{name}: log-probs off by {error:.2g} on a test forest (allowed {check.tolerance:.2g})")
    return agreed, refusals


def _time(causal: PreTrainedModel, names: Sequence[str]) -> dict[str, float]:
    """Step 3: seconds that each of several tree backends takes for a layer of this model; {} if there is one."""
    if len(names) == 1:
        return {}
    forest = timing.sample_forest(causal.device, causal.config.get_text_config().vocab_size)
    layers: list[tuple[Tensor, Tensor, Tensor, Rules]] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
        layers.append((query, key, value, rules))
        return BACKENDS[names[0]].attend(query, key, value, forest, rules)

    patches = Patches(causal)
    families.prepare(causal, patches)(forest, watched)
    patches.undo()
    query, key, value, rules = layers[0]
    layers.clear()
    return {name: timing.seconds(BACKENDS[name].attend, query, key, value, forest, rules) for name in names}


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a PEFT model if it is in one (LoRA layers stay injected)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"need a transformers causal language model, got {type(inner).__name__}")
    return inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, for as long as the block lasts; the mode before it comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
