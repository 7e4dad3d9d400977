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
from preftree.model.paths import chosen_logprobs, plain_logits, plain_logprobs, stock_attention
from preftree.model.structure import selects_keys

#: How many times the model's own noise another way of computing may be off.
NOISES = 3.0
#: What no noise is measured below, in nats: torch's float32 log_softmax over a large vocabulary is off by 1e-5.
SMALLEST_TOLERANCE, SMALLEST_MEAN, SMALLEST_LEAK = 3e-5, 1e-5, 1e-5
#: Draws of other roundings that the noise is the largest of; more of them where a choice makes outliers.
DRAWS, DRAWS_OF_CHOICES = 4, 8
#: By how many roundings a product is moved: half precisions add up in float32 and round once, float32 many times.
ROUNDINGS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 4.0}
#: Leaves of the probe that are changed to see whether others notice.
CHANGED = (0, 2, 4)


@dataclass(frozen=True, eq=False)
class SelfCheck:
    """What the model itself says of a forest.

    Args:
        probe: the forest.
        expected_S: log p of its scored tokens.
        tolerance: how far another way of computing them may be off, in nats.
        mean: how far on average over the tokens. One token in many is an outlier of rounding, a wrong mask moves all.
        leak: how far the log-prob of an answer may move when only other answers change.
    """

    probe: Forest
    expected_S: Tensor
    tolerance: float
    mean: float
    leak: float

    def error(self, score: Callable[[Forest], Tensor]) -> float:
        """The largest difference of `score` from what the model says.

        Raises:
            ModelError: log-probs are off on average, or other answers in the forest change an answer's.
        """
        found_S = score(self.probe)
        off_S = (found_S - self.expected_S).abs()
        error, mean = float(off_S.max()), float(off_S.mean())
        if error <= self.tolerance and not mean <= self.mean:
            raise ModelError(f"log-probs off by {mean:.2g} on average over a test forest (allowed {self.mean:.2g})")
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

    Random tokens have log-probs of about −log V; a wrong mask or position moves them by tenths and more. How far right
    ways of computing are apart depends on the model and its precision, from 1e-6 to tenths, so that the model's own
    noise is the measure (see `_noise`). Float64 models still cast to float32 inside (eager softmax, norms).

    A change of other answers changes no number of an answer's own computation, whatever the precision. Experts are the
    exception: how many tokens one of them gets decides the shape of its products, and that the rounding.
    """
    patches = Patches(causal)
    try:
        probe = probe_forest(causal)
        # Eager attention is the model's definition: sdpa, for one, drops Gemma 2's softcap.
        stock_attention(causal, "eager", patches)
        expected_S = plain_logprobs(causal, probe)
        largest, mean = (NOISES * noise for noise in _noise(causal, probe, expected_S))
    finally:
        patches.undo()
    tolerance = max(largest, SMALLEST_TOLERANCE)
    leak = tolerance if has_experts(causal) else max(tolerance / 20, SMALLEST_LEAK)
    return SelfCheck(probe, expected_S, tolerance, max(mean, SMALLEST_MEAN), leak)


def _noise(causal: PreTrainedModel, probe: Forest, expected_S: Tensor) -> tuple[float, float]:
    """How far rounding alone moves the model's log-probs, the largest move and the mean one: the largest of each among
    several draws of other roundings.

    Not how far the model's own ways of computing are apart (padded, other attention): one of them may be wrong.
    """
    draws, parts = draws_of(causal), []
    with rounded_otherwise(causal):
        for sequence_N, length in zip(probe.unrolled(), probe.leaf_lengths, strict=True):
            logits_BSV = plain_logits(causal, sequence_N.expand(draws, -1), length)  # every copy is moved by itself
            parts.append(chosen_logprobs(logits_BSV, sequence_N))
    moves_BS = (torch.cat(parts, dim=1) - expected_S).abs()
    return float(moves_BS.max()), float(moves_BS.mean(dim=1).max())


def draws_of(causal: PreTrainedModel) -> int:
    """How many draws of other roundings tell a model's noise; half as many where no outlier of them is near a nat."""
    draws = DRAWS_OF_CHOICES if has_choices(causal) else DRAWS
    return draws if causal.dtype in (torch.bfloat16, torch.float16) else draws // 2


@contextmanager
def rounded_otherwise(causal: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """The output of every product and norm moved by about a rounding of its precision, at random."""
    random = torch.Generator().manual_seed(seed)
    moves = _unit_of_products(causal)

    def hook(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        factor = torch.rand(output.shape, generator=random).mul_(moves).add_(1 - moves / 2).to(output.device)
        return (output.to(torch.promote_types(output.dtype, torch.float32)) * factor).to(output.dtype)

    handles = [module.register_forward_hook(hook) for module in causal.modules() if not any(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unit_of_products(causal: PreTrainedModel) -> float:
    """How far two right ways of computing a product may be apart, as a part of it."""
    dtype = causal.dtype if causal.dtype in ROUNDINGS else torch.float32
    unit = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    faster = {"high": 2**-10, "medium": 2**-7}  # TF32 and bfloat16 in the place of float32, where they are allowed
    return max(unit, faster.get(torch.get_float32_matmul_precision(), 0.0))


def has_experts(causal: PreTrainedModel) -> bool:
    """Does a router choose which weights a token meets? Rounding may then change the choice."""
    return any("expert" in name for name, _ in causal.named_modules())


def has_choices(causal: PreTrainedModel) -> bool:
    """Does it choose experts or keys, so that a rounding can turn a choice?"""
    return has_experts(causal) or selects_keys(causal)


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
