"""What every path is compared with before it is used: a small forest, scored by the model's own plain forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.errors import ModelError
from preftree.forest import Bundle, Forest
from preftree.model.patch import Patches
from preftree.model.paths import plain_logprobs, stock_attention

#: In half precisions, how many times the model's own noise another way of computing may be off.
NOISES = 3.0
#: Draws of other roundings that the noise is the largest of; more of them where a router makes outliers.
DRAWS, DRAWS_OF_EXPERTS = 4, 8
#: Leaves of the probe that are changed to see whether others notice.
CHANGED = (0, 2, 4)


@dataclass(frozen=True, eq=False)
class SelfCheck:
    """What the model itself says of a forest.

    Args:
        probe: the forest.
        expected_S: log p of its scored tokens.
        tolerance: how far another way of computing them may be off, in nats.
        leak: how far the log-prob of an answer may move when only other answers change.
    """

    probe: Forest
    expected_S: Tensor
    tolerance: float
    leak: float

    def error(self, score: Callable[[Forest], Tensor]) -> float:
        """The largest difference of `score` from what the model says.

        Raises:
            ModelError: other answers in the forest change an answer's log-probs.
        """
        found_S = score(self.probe)
        error = float((found_S - self.expected_S).abs().max())
        if error <= self.tolerance and (leak := self._leak(score, found_S)) > self.leak:
            raise ModelError(f"log-probs move by {leak:.2g} when another answer changes (allowed {self.leak:.2g})")
        return error

    def _leak(self, score: Callable[[Forest], Tensor], found_S: Tensor) -> float:
        changed = [leaf for leaf, name in enumerate(self.probe.leaf_ids) if name in CHANGED]
        kept_S = ~torch.isin(self.probe.leaf_S, torch.tensor(changed, device=self.probe.device))
        moved_S = (score(_with_other_answers(self.probe)) - found_S).abs()[kept_S]
        return float(moved_S.max())


def of_model(causal: PreTrainedModel) -> SelfCheck:
    """Score the probe with the model as it is; call it in evaluation mode, without gradients.

    Random tokens have log-probs of about −log V; a wrong mask or position moves them by tenths and more. Float64
    models still cast to float32 inside (eager softmax, norms), and layers amplify that. In half precisions the model's
    own ways of computing differ by tenths too, so there its own noise is the measure (see `_noise`).

    A change of other answers changes no number of an answer's own computation, whatever the precision. Experts are the
    exception: how many tokens one of them gets decides the shape of its products, and that the rounding.
    """
    patches = Patches(causal)
    try:
        probe = probe_forest(causal)
        # Eager attention is the model's definition: sdpa, for one, drops Gemma 2's softcap.
        stock_attention(causal, "eager", patches)
        expected_S = plain_logprobs(causal, probe)
        if causal.dtype in (torch.bfloat16, torch.float16):
            tolerance = NOISES * _noise(causal, probe, expected_S)
        else:
            exact = expected_S.dtype == torch.float32 and causal.dtype == torch.float32
            tolerance = 2e-3 if exact else 1e-4
    finally:
        patches.undo()
    return SelfCheck(probe, expected_S, tolerance, tolerance if has_experts(causal) else tolerance / 20)


def _noise(causal: PreTrainedModel, probe: Forest, expected_S: Tensor) -> float:
    """How far rounding alone moves the model's log-probs: the largest of several draws of other roundings.

    Not how far the model's own ways of computing are apart (padded, other attention): one of them may be wrong.
    """
    draws = DRAWS_OF_EXPERTS if has_experts(causal) else DRAWS
    with _rounded_otherwise(causal):
        return max(float((plain_logprobs(causal, probe) - expected_S).abs().max()) for _ in range(draws))


@contextmanager
def _rounded_otherwise(causal: PreTrainedModel) -> Iterator[None]:
    """The output of every product and norm moved by up to half a rounding of its dtype, at random."""
    random = torch.Generator().manual_seed(0)

    def hook(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        draw = torch.rand(output.shape, generator=random).to(output.device)
        moved = output.float() * (1 + torch.finfo(output.dtype).eps * (draw - 0.5))
        return moved.to(output.dtype)

    handles = [module.register_forward_hook(hook) for module in causal.modules() if not any(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def has_experts(causal: PreTrainedModel) -> bool:
    """Does a router choose which weights a token meets? Rounding may then change the choice."""
    return any("expert" in name for name, _ in causal.named_modules())


def own_attention(causal: PreTrainedModel) -> str:
    """The attention the model came with; eager where its default leaves out part of the model (a softcap)."""
    stock = getattr(causal.config, "_attn_implementation", None) or "eager"
    capped = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else stock


def probe_forest(causal: PreTrainedModel) -> Forest:
    """A small forest with everything in it: two trees, a shared prefix, a fork of forks, leaves of several lengths."""
    vocabulary = causal.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (count,), generator=random).tolist())

    shared = ids(10)
    bundles = [
        Bundle(shared + ids(6), (ids(5), ids(1)), (0, 1)),
        Bundle(shared + ids(3), (ids(4), ids(6)), (2, 3)),
        Bundle(ids(7), (ids(3), ids(2)), (4, 5)),
    ]
    return Forest.of(bundles, device=causal.device)


def _with_other_answers(probe: Forest) -> Forest:
    """The probe with other tokens in the leaves `CHANGED`, each of which precedes one that stays."""
    ids = list(probe.tokens)
    for segment in probe.segments:
        if segment.leaf is not None and probe.leaf_ids[segment.leaf] in CHANGED:
            # Tokens of the probe, so that they are known to the model; a leaf's own would be no change.
            ids[segment.start : segment.end] = ids[: segment.end - segment.start]
    input_ids_T = torch.tensor(ids, device=probe.device)
    return replace(probe, input_ids_T=input_ids_T, tokens=tuple(ids))
