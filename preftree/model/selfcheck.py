"""What every path is held against before it is used: a small forest, scored by the model's own plain forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftree.forest import Bundle, Forest
from preftree.model.patch import Patches
from preftree.model.paths import padded_logprobs, plain_logprobs, stock_attention


@dataclass(frozen=True, eq=False)
class Truth:
    """What the model itself says of a forest.

    Args:
        probe: the forest.
        expected_S: log p of its scored tokens.
        tolerance: how far another way of computing them may be off, in nats.
    """

    probe: Forest
    expected_S: Tensor
    tolerance: float

    def error(self, found_S: Tensor) -> float:
        """The largest difference from what the model says."""
        return float((found_S - self.expected_S).abs().max())


def truth(causal: PreTrainedModel, stock: str) -> Truth:
    """Score the probe with the model as it is; call it in evaluation mode, without gradients.

    Random tokens have log-probs of about −log V; a wrong mask or position moves them by tenths and more. Float64
    models still cast to float32 inside (eager softmax, norms), and layers amplify that. In half precisions the model's
    own ways of computing attention differ by tenths too, so there they are the measure: one sequence at a time and
    padded, eager and `stock`.
    """
    patches = Patches(causal)
    try:
        return _truth(causal, probe_forest(causal), stock, patches)
    finally:
        patches.undo()


def _truth(causal: PreTrainedModel, probe: Forest, stock: str, patches: Patches) -> Truth:
    # Eager attention is the model's definition: sdpa, for one, drops Gemma 2's softcap.
    stock_attention(causal, "eager", patches)
    expected_S = plain_logprobs(causal, probe)
    if causal.dtype not in (torch.bfloat16, torch.float16):
        exact = expected_S.dtype == torch.float32 and causal.dtype == torch.float32
        return Truth(probe, expected_S, 2e-3 if exact else 1e-4)
    apart = []
    for attention in dict.fromkeys(("eager", stock)):
        stock_attention(causal, attention, patches)
        for way in (plain_logprobs, padded_logprobs):
            try:
                apart.append(float((way(causal, probe) - expected_S).abs().max()))
            except Exception:  # a model without a padded path is measured against the fixed bound alone
                continue
    return Truth(probe, expected_S, min(max(0.25, 2 * max(apart, default=0.0)), 0.5))


def own_attention(causal: PreTrainedModel) -> str:
    """The attention the model came with; eager where its default leaves out part of the model (a softcap)."""
    stock = getattr(causal.config, "_attn_implementation", None) or "eager"
    capped = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else stock


def probe_forest(causal: PreTrainedModel) -> Forest:
    """A small forest with everything in it: two trees, a shared prefix, a fork of forks, leaves of several lengths."""
    config = causal.config.get_text_config()
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(config.vocab_size, (count,), generator=random).tolist())

    shared = ids(10)
    bundles = [
        Bundle(shared + ids(6), (ids(5), ids(1)), (0, 1)),
        Bundle(shared + ids(3), (ids(4), ids(6)), (2, 3)),
        Bundle(ids(7), (ids(3), ids(2)), (4, 5)),
    ]
    return Forest.of(bundles, device=causal.device)
