"""Log-probs of given tokens from hidden states, without ever holding (all positions × vocabulary).

The logits of a chunk of rows live only while that chunk is worked on. Where the head is frozen, the gradient
with respect to the hidden states is formed in the same pass,

    d log p(y) / d h  =  W[y] − softmax(h Wᵀ) W        (then through softcap and scale, if there are any)

and kept instead of the logits: size (S, D), nothing of size vocabulary, and nothing is recomputed. Where the head is
trained, a chunk's logits are computed once more for the backward pass (the weight's gradient needs what comes from
above), and every other head goes through autograd, with its chunks recomputed.

Shape suffixes: S scored rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from preftree.model.cpu.linear import input_gradient, linear
from preftree.model.cpu.softmax import exponentiate

#: Bytes of float32 logits held at a time. Larger chunks gain nothing once the GEMM is large.
CHUNK_BYTES = 64 * 2**20
#: The same without gradients, where log-softmax takes as much again and scored rows are few.
SCORED_CHUNK_BYTES = 16 * 2**20


#: Fields of a config that multiply, divide or cap logits.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
#: Model types that have such a field and do not use it, or multiply where others divide.
_UNUSED = {"mpt": ("logit_scale",)}
_INVERTED = ("hyperclovax",)


@dataclass(frozen=True, eq=False)
class Head:
    """How a model turns hidden states into logits: `softcap(scale · module(h))`.

    Args:
        module: the output embedding.
        scale: factor on the logits (Cohere's `logit_scale`, Falcon-H1's `lm_head_multiplier`, the inverse of Granite's
            `logits_scaling`).
        softcap: logits become `softcap · tanh(logits / softcap)` (Gemma 2).
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Read the head of a transformers causal language model off its config."""
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        values = {name: getattr(config, name, None) for name in (*_FACTORS, *_DIVISORS, *_CAPS)}
        known = {name: float(value) for name, value in values.items() if isinstance(value, int | float) and value}
        for name in _UNUSED.get(config.model_type, ()):
            known.pop(name, None)
        scale = math.prod(known.get(name, 1.0) for name in _FACTORS)
        divisor = math.prod(known.get(name, 1.0) for name in _DIVISORS)
        return cls(
            module=model.get_output_embeddings(),  # type: ignore[operator]
            scale=scale * divisor if config.model_type in _INVERTED else scale / divisor,
            softcap=next((known[name] for name in _CAPS if name in known), None),
        )

    @property
    def fusable(self) -> bool:
        """A frozen plain linear layer; an adapter or a trained weight needs another way."""
        module = self.module
        return type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters())

    @property
    def trained(self) -> bool:
        """A trained plain linear layer without a softcap, whose weight can be read outside of its forward."""
        module = self.module
        plain = type(module) is nn.Linear and self.softcap is None and not isinstance(module.weight, DTensor)
        return plain and any(p.requires_grad for p in module.parameters())

    @property
    def shaped(self) -> bool:
        """Are logits more than the module's output?"""
        return self.scale != 1.0 or self.softcap is not None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Float32 logits (float64 if the model is), (C, V), of a few rows."""
        return self.shape(self.module(hidden_CD))[0]

    def shape(self, raw_CV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scaled and capped logits, and tanh of the cap's argument for its derivative."""
        logits_CV = raw_CV.to(torch.promote_types(raw_CV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is None:
            return logits_CV, None
        tanh_CV = torch.tanh(logits_CV / self.softcap)
        return tanh_CV * self.softcap, tanh_CV


class TokenStats:
    """What the head knows of each scored token besides its log-prob, filled in while that is computed; no gradients.

    Args:
        collision: also log Σ p², which takes a pass over the vocabulary.
    """

    def __init__(self, collision: bool = False) -> None:
        self.collision = collision
        self.values_KS = torch.empty(0, 0)

    @property
    def entropy_S(self) -> Tensor:
        """−Σ p log p, in nats."""
        return self.values_KS[0]

    @property
    def mean_logit_S(self) -> Tensor:
        """The mean over the vocabulary."""
        return self.values_KS[1]

    @property
    def top1_S(self) -> Tensor:
        """1 where the token is the most probable one, else 0."""
        return self.values_KS[2]

    @property
    def collision_S(self) -> Tensor:
        """log Σ p²"""
        return self.values_KS[3]

    def begin(self, count: int, like: Tensor) -> None:
        """Room for `count` tokens."""
        wide = torch.promote_types(like.dtype, torch.float32)
        self.values_KS = torch.zeros(3 + self.collision, count, dtype=wide, device=like.device)

    @torch.no_grad()
    def put(self, start: int, columns: list[Tensor]) -> None:
        """The values of a chunk of tokens from `start` on; again with the same ones where it is recomputed."""
        self.values_KS[:, start : start + len(columns[0])] = torch.stack(
            [column.to(self.values_KS) for column in columns]
        )

    @torch.no_grad()
    def put_logits(self, start: int, logits_CV: Tensor, target_C: Tensor) -> None:
        """The same from the logits themselves."""
        logp_CV = torch.log_softmax(logits_CV, 1)
        columns = [
            -(logp_CV.exp() * logp_CV).sum(1),
            logits_CV.mean(1),
            logits_CV.argmax(1) == target_C,
        ]
        self.put(start, columns + ([(2 * logp_CV).logsumexp(1)] if self.collision else []))


def token_logprobs(hidden_SD: Tensor, target_S: Tensor, head: Head, stats: TokenStats | None = None) -> Tensor:
    """log p(target) for each row of hidden states; (S,) in float32 (float64 if the model is).

    Args:
        stats: filled in, if given.
    """
    if torch.is_autocast_enabled(hidden_SD.device.type):
        # Lists of what autocast runs in bfloat16 differ by vendor; some have the softmax over the vocabulary in it.
        weight_dtype = next(head.module.parameters()).dtype
        with torch.autocast(hidden_SD.device.type, enabled=False):
            return token_logprobs(hidden_SD.to(weight_dtype), target_S, head, stats)
    if stats is not None:
        stats.begin(len(target_S), hidden_SD)
    if head.fusable:
        return _FusedLogprobs.apply(hidden_SD, target_S, head, stats)
    if head.trained:
        layer: Any = head.module
        return _TrainedLogprobs.apply(hidden_SD, layer.weight, layer.bias, target_S, head, stats)
    parts, rows = [], _chunk_rows(head.module)
    for start in range(0, max(len(target_S), 1), rows):
        chunk = hidden_SD[start : start + rows], target_S[start : start + rows], head, stats, start
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logprobs, *chunk, use_reentrant=False))
        else:
            parts.append(_chunk_logprobs(*chunk))
    return torch.cat(parts)


@torch.no_grad()
def token_scores(hidden_RD: Tensor, slot_S: Tensor, target_S: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """log p(target), (S,), and whether the target is the most probable token, (S,) booleans. No gradients.

    Args:
        hidden_RD: R rows of hidden states; several targets may share one, whose logits are computed once.
        slot_S: the row of each target, ascending.
    """
    rows = _chunk_rows(head.module, SCORED_CHUNK_BYTES)
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    logprob_S = torch.empty(len(target_S), dtype=wide, device=hidden_RD.device)
    greedy_S = torch.empty_like(logprob_S, dtype=torch.bool)
    edges = torch.searchsorted(slot_S, torch.arange(0, len(hidden_RD) + rows, rows, device=slot_S.device)).tolist()
    for number, (first, last) in enumerate(pairwise(edges)):
        logits_CV = head.logits(hidden_RD[number * rows : (number + 1) * rows])
        slot_s, target_s = slot_S[first:last] - number * rows, target_S[first:last]
        greedy_S[first:last] = logits_CV.argmax(1)[slot_s] == target_s
        # Not a sum of our own: torch's float32 log_softmax over a large vocabulary is off by up to 1e-5 per token,
        # and what everybody else reports is made with it.
        logprob_S[first:last] = torch.log_softmax(logits_CV, 1)[slot_s, target_s]
    return logprob_S, greedy_S


def _chunk_rows(module: nn.Module, size: int | None = None) -> int:
    """Rows whose logits are held at a time, in `size` bytes; None means `CHUNK_BYTES`."""
    weight = getattr(module, "weight", None)
    vocabulary = int(weight.shape[0]) if isinstance(weight, Tensor) else 1 << 17
    return max(1, (size or CHUNK_BYTES) // (4 * vocabulary))


def _chunk_logprobs(hidden_CD: Tensor, target_C: Tensor, head: Head, stats: TokenStats | None, start: int) -> Tensor:
    logits_CV = head.logits(hidden_CD)
    if stats is not None:
        stats.put_logits(start, logits_CV, target_C)
    return logits_CV.gather(1, target_C[:, None]).squeeze(1) - logits_CV.logsumexp(1)


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SD, target_S, head: Head, stats: TokenStats | None):  # type: ignore[no-untyped-def]
        assert isinstance(head.module, nn.Linear)
        rows = _chunk_rows(head.module)
        weight_VD, bias_V = head.module.weight, head.module.bias
        need_grad = ctx.needs_input_grad[0]
        out_S = hidden_SD.new_empty(hidden_SD.shape[0], dtype=torch.promote_types(hidden_SD.dtype, torch.float32))
        slope_SD = torch.empty_like(hidden_SD) if need_grad else None
        for start in range(0, hidden_SD.shape[0], rows):
            chunk = slice(start, start + rows)
            target_C = target_S[chunk]
            raw_CV = linear(hidden_SD[chunk], weight_VD, bias_V)
            shaped_CV, tanh_CV = head.shape(raw_CV) if head.shaped else (raw_CV, None)
            mean_C = shaped_CV.mean(1) if stats is not None and tanh_CV is not None else None
            # Where the slope is formed, h · slope gives the entropy without a pass over the vocabulary (see below).
            along_slope = slope_SD is not None and tanh_CV is None and bias_V is None
            entropy_C = None if stats is None or along_slope else out_S.new_empty(len(target_C))
            # Passes over (C, V) are what the head costs besides its two GEMMs, so the logits' memory is used again.
            out_S[chunk], exp_CV, total_C = exponentiate(shaped_CV, target_C, entropy_C)
            found = exp_CV, total_C, out_S[chunk]
            if stats is not None and entropy_C is not None:
                stats.put(start, _chunk_stats(hidden_SD[chunk], head, found, stats.collision, entropy_C, mean_C))
            if slope_SD is None:
                continue
            if tanh_CV is None:
                # onehot(y) W − softmax W, the division by the total put off until the vocabulary is gone.
                expected_CD = input_gradient(exp_CV.to(weight_VD.dtype), weight_VD).to(total_C.dtype) / total_C[:, None]
                slope_CD = weight_VD[target_C] - expected_CD
                if stats is not None and along_slope:
                    # −Σ p log p  =  scale · h · (W[y] − softmax·W) − log p(y)
                    moved_C = (hidden_SD[chunk].to(total_C.dtype) * slope_CD).sum(1)
                    entropy_C = head.scale * moved_C - out_S[chunk]
                    stats.put(start, _chunk_stats(hidden_SD[chunk], head, found, stats.collision, entropy_C))
            else:
                slope_CV = exp_CV.div_(total_C[:, None]).neg_()
                slope_CV.scatter_add_(1, target_C[:, None], torch.ones_like(target_C[:, None], dtype=slope_CV.dtype))
                slope_CV *= 1 - tanh_CV * tanh_CV
                slope_CD = input_gradient(slope_CV.to(weight_VD.dtype), weight_VD)
            slope_SD[chunk] = slope_CD * head.scale
        ctx.save_for_backward(slope_SD)
        return out_S

    @staticmethod
    def backward(ctx, grad_S):  # type: ignore[no-untyped-def]
        (slope_SD,) = ctx.saved_tensors
        return (slope_SD * grad_S[:, None]).to(slope_SD.dtype), None, None, None


class _TrainedLogprobs(torch.autograd.Function):
    """The same for a head that is trained, without a softcap: weight (V, D) and bias (V,) or None have gradients too.

    With E the numerators of the softmax, t their sums and g = gradient · scale,

        d / d W  =  Σ g (onehot(y) − E / t) hᵀ  =  −(E − t onehot(y))ᵀ (g / t · h)

    so that E is multiplied as it is, in two products, and nothing else passes over the vocabulary.
    """

    @staticmethod
    def forward(ctx, hidden_SD, weight_VD, bias_V, target_S, head: Head, stats: TokenStats | None):  # type: ignore[no-untyped-def]
        rows = _chunk_rows(head.module)
        out_S = hidden_SD.new_empty(len(hidden_SD), dtype=torch.promote_types(hidden_SD.dtype, torch.float32))
        for start in range(0, len(hidden_SD), rows):
            chunk = slice(start, start + rows)
            entropy_C = out_S[chunk].clone() if stats is not None else None
            found = _numerators(hidden_SD[chunk], weight_VD, bias_V, target_S[chunk], head, entropy_C)
            out_S[chunk] = found[2]
            if stats is not None and entropy_C is not None:
                stats.put(start, _chunk_stats(hidden_SD[chunk], head, found, stats.collision, entropy_C))
        ctx.save_for_backward(hidden_SD, weight_VD, bias_V, target_S)
        ctx.head, ctx.rows = head, rows
        return out_S

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_S):  # type: ignore[no-untyped-def]
        hidden_SD, weight_VD, bias_V, target_S = ctx.saved_tensors
        hidden_grad_SD = torch.empty_like(hidden_SD)
        weight_grad_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        bias_grad_V = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden_SD), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            target_C1 = target_S[chunk, None]
            exp_CV, total_C, _ = _numerators(hidden_SD[chunk], weight_VD, bias_V, target_S[chunk], ctx.head)
            exp_CV = exp_CV.to(weight_VD.dtype)
            above_C1 = grad_S[chunk, None] * ctx.head.scale
            expected_CD = input_gradient(exp_CV, weight_VD).to(total_C.dtype) / total_C[:, None]
            hidden_grad_SD[chunk] = above_C1 * (weight_VD[target_S[chunk]] - expected_CD)
            exp_CV.scatter_add_(1, target_C1, -total_C[:, None].to(exp_CV.dtype))
            share_C1 = above_C1 / total_C[:, None]
            if weight_grad_VD is not None:
                weight_grad_VD.addmm_(exp_CV.T, (share_C1 * hidden_SD[chunk]).to(weight_VD.dtype), alpha=-1)
            if bias_grad_V is not None:
                bias_grad_V.addmv_(exp_CV.T, share_C1.squeeze(1).to(bias_V.dtype), alpha=-1)
        return hidden_grad_SD, weight_grad_VD, bias_grad_V, None, None, None


def _numerators(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_C: Tensor,
    head: Head,
    entropy_C: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials of a chunk's logits without a softcap, their sums, and log p of the targets."""
    raw_CV = linear(hidden_CD, weight_VD, bias_V)
    logprob_C, exp_CV, total_C = exponentiate(head.shape(raw_CV)[0] if head.shaped else raw_CV, target_C, entropy_C)
    return exp_CV, total_C, logprob_C


def _chunk_stats(
    hidden_CD: Tensor,
    head: Head,
    found: tuple[Tensor, Tensor, Tensor],
    collision: bool,
    entropy_C: Tensor,
    mean_C: Tensor | None = None,
) -> list[Tensor]:
    """The columns of `TokenStats` from what `exponentiate` gave, without the logits.

    Args:
        found: exponentials, their sums, and log p of the targets.
        mean_C: mean logits, where they are no linear function of the hidden states.
    """
    exp_CV, total_C, logprob_C = found
    module: Any = head.module
    wide = total_C.dtype
    if mean_C is None:
        mean_C = (hidden_CD @ module.weight.mean(0, dtype=wide).to(hidden_CD.dtype)).to(wide)
        mean_C = head.scale * (mean_C if module.bias is None else mean_C + module.bias.mean())
    columns = [entropy_C, mean_C, logprob_C >= -total_C.log() - 1e-6]
    if collision:
        columns.append(2 * (torch.linalg.vector_norm(exp_CV, dim=1, dtype=wide).log() - total_C.log()))
    return columns
