"""The ways to log-probs of a forest's scored tokens.

    tree     every prompt once, our attention, log-probs without logits; one path for each attention backend
    padded   right-padded single sequences through the model's own attention, log-probs without logits
    plain    the model's own logits, one sequence at a time: the reference for everything else

Shape suffixes: T tokens of a forest, S scored tokens, V vocabulary, D hidden size, B sequences, N their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from preftree.forest import Forest
from preftree.model import cpu, families
from preftree.model.attention import BACKENDS, Backend
from preftree.model.families.interface import body_of, set_attention
from preftree.model.logprob import Head, TokenStats, token_logprobs
from preftree.model.patch import Patches
from preftree.model.structure import Limits, Score

#: Paths through single sequences, the faster one first.
SEQUENCES = ("padded", "plain")


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenPath:
    """A path that a model is patched for.

    Args:
        score: log p of a forest's scored tokens, (S,); fills in their statistics, if there are any to fill.
        limits: up to where it computes answers together.
        note: what was done for speed, in words.
    """

    score: Score
    limits: Limits
    note: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class TreePath(OpenPath):
    """A path that computes every prompt once.

    Args:
        body: the model up to its head.
        backend: the attention that it uses.
    """

    body: families.Body
    backend: Backend


def open_path(causal: PreTrainedModel, name: str, stock: str, patches: Patches, room: int | None) -> OpenPath:
    """Patch `causal` for the path called `name`.

    Args:
        stock: the model's own attention, which paths through single sequences use.
        room: free bytes for packed weights (see `cpu.patch`).
    """
    limits = Limits.of(causal)
    if name in SEQUENCES:
        cpu.patch(causal, patches, kernels=False)
        stock_attention(causal, stock, patches)
        sequences = partial(padded_logprobs if name == "padded" else plain_logprobs, causal)
        return OpenPath(score=_to_shape(limits.applied(sequences, sequences)), limits=limits)
    backend = BACKENDS[name]
    note = cpu.patch(causal, patches, kernels=backend.cpu_kernels, room=room)
    body = families.prepare(causal, patches)

    def tree_logprobs(forest: Forest, stats: TokenStats | None = None) -> Tensor:
        hidden_SD = body(forest, backend.attend).index_select(0, forest.predictor_S)
        # The head is looked up at every call: LoRA may be put on it after attaching.
        return token_logprobs(hidden_SD, forest.target_S, Head.of(causal), stats)

    score = _to_shape(limits.applied(tree_logprobs, partial(padded_logprobs, causal)))
    return TreePath(score=score, limits=limits, note=note, body=body, backend=backend)


def stock_attention(causal: PreTrainedModel, name: str, patches: Patches | None = None) -> None:
    """Switch a model's own attention, until `patches` are undone; a model that has one alone keeps it."""
    if getattr(causal.config, "_attn_implementation", None) != name:
        set_attention(causal, name, patches)


def plain_logprobs(causal: PreTrainedModel, forest: Forest, stats: TokenStats | None = None) -> Tensor:
    """Log-probs from the model's own logits, one sequence at a time."""
    parts: list[Tensor] = []
    if stats is not None:
        stats.begin(sum(forest.leaf_lengths), torch.empty(0, dtype=causal.dtype, device=forest.device))
    for sequence, length in zip(forest.unrolled(), forest.leaf_lengths, strict=True):
        logits_1SV = plain_logits(causal, sequence[None], length)
        if stats is not None:
            stats.put_logits(sum(map(len, parts)), logits_1SV[0], sequence[-length:])
        parts.append(chosen_logprobs(logits_1SV, sequence)[0])
    return torch.cat(parts)


def plain_logits(causal: PreTrainedModel, ids_BN: Tensor, length: int) -> Tensor:
    """What the model says of the last `length` tokens of sequences, (B, S, V), in float32 at least."""
    logits_BSV = causal(input_ids=ids_BN, use_cache=False).logits[:, -length - 1 : -1]
    return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))


def chosen_logprobs(logits_BSV: Tensor, sequence_N: Tensor) -> Tensor:
    """Log-probs (B, S) of the last tokens of one sequence, by each of B rows of logits."""
    batch, length, _ = logits_BSV.shape
    ids_BS1 = sequence_N[-length:].expand(batch, -1)[..., None]
    return torch.log_softmax(logits_BSV, dim=-1).gather(2, ids_BS1).squeeze(2)


def padded_logprobs(causal: PreTrainedModel, forest: Forest, stats: TokenStats | None = None) -> Tensor:
    """Log-probs from padded sequences, without logits."""
    ids_BN, mask_BN, predictor_S = _pad(forest)
    hidden_BND = body_of(causal)(input_ids=ids_BN, attention_mask=mask_BN, use_cache=False).last_hidden_state
    hidden_SD = hidden_BND.flatten(0, 1).index_select(0, predictor_S)
    return token_logprobs(hidden_SD, forest.target_S[: len(predictor_S)], Head.of(causal), stats)


def _pad(forest: Forest) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves as right-padded sequences: ids and mask (B, N), and each scored token's predictor as an index
    into the flattened (B · N)."""
    sequences = forest.unrolled()
    longest = max(len(sequence) for sequence in sequences)
    ids_BN = torch.zeros(len(sequences), longest, dtype=torch.long, device=forest.device)
    mask_BN = torch.zeros_like(ids_BN)
    predictors = []
    for row, (sequence, length) in enumerate(zip(sequences, forest.leaf_lengths, strict=True)):
        ids_BN[row, : len(sequence)] = sequence
        mask_BN[row, : len(sequence)] = 1
        first = row * longest + len(sequence) - length - 1
        predictors.append(torch.arange(first, first + length, device=forest.device))
    return ids_BN, mask_BN, torch.cat(predictors)


def _to_shape(score: Score) -> Score:
    """Zeros for the scored padding of a forest of fixed shape, which single sequences leave out."""

    def padded(forest: Forest, stats: TokenStats | None = None) -> Tensor:
        token_S = score(forest, stats)
        missing = len(forest.target_S) - len(token_S)
        return pad(token_S, (0, missing)) if missing else token_S

    return padded
