"""Tokens per forest: as many as memory allows, up to where more brings no speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from preftree.errors import SettingsError
from preftree.forest import Bundle, Forest, Pair, Shape, pair_size
from preftree.hardware.device import Choice, kind_of
from preftree.hardware.limits import Limit
from preftree.hardware.memory import available_memory, ranks_on_host, tightest_limit
from preftree.model.cpu.linear import promised_bytes
from preftree.model.logprob import CHUNK_BYTES
from preftree.model.score import Scorer, leaf_logprobs

#: Tokens per forest above which training is no faster: GEMMs are large enough by then.
SATURATING_TOKENS = {"cpu": 2048, "cuda": 16384}
#: Elsewhere attention takes a mask of tokens x tokens, whose cost overtakes the GEMMs'.
SATURATING_TOKENS_ELSEWHERE = 4096
#: Share of the memory that is free now which activations may take.
ACTIVATION_SHARE = 0.6
#: Of what is free, left to compiled products, the optimizer and the allocator's gaps, beside the head (`reserved`).
RESERVE = 160 * 2**20
#: What lives only for a moment while a layer is worked on, in layers of kept activations.
TRANSIENT_LAYERS = 1.5


@dataclass(frozen=True)
class Budget:
    """Maximum tokens per forest, whether activations are recomputed to keep them, and why."""

    tokens: int
    checkpointing: bool
    reason: str


def choose_budget(
    policy: Scorer,
    *,
    largest: int,
    checkpointing: bool = False,
    asked: int | None = None,
    max_memory: int | None = None,
) -> Budget:
    """How large a forest may be, from what a token of this model keeps (measured) and the memory there is.

    Args:
        policy: of the model with its adapter.
        largest: tokens of the largest single pair, which cannot be cut.
        checkpointing: recompute activations in any case; without it that is done where the largest pair needs it.
        asked: tokens that the user asked for.
        max_memory: bytes that the process may take in all, None for what is free.

    Raises:
        SettingsError: `max_memory` has no room for the largest pair.
    """
    if asked is not None:
        return Budget(asked, checkpointing, "asked for by --tokens_per_forest")
    model, device = policy.causal, str(policy.causal.device)
    promised = promised_bytes(model) + training_bytes(policy.model) + reserved(model)
    free, word = _room(device, max_memory, promised)
    kept = kept_bytes(policy)
    layers = int(model.config.get_text_config().num_hidden_layers)
    plain, recomputed = kept * (layers + TRANSIENT_LAYERS) / layers, kept_when_recomputing(model, kept)
    why = ""
    if not checkpointing and free / plain < largest:
        checkpointing = True
        why = f"; activations are recomputed, as the largest pair ({largest} tokens) would not fit otherwise"
    per_token = recomputed if checkpointing else plain
    fits = int(free / per_token)
    word = f"{word}, {per_token / 2**10:.0f} KiB per token (measured)"
    if fits < largest and max_memory is not None:
        more = (largest - fits) * per_token / 2**30
        raise SettingsError(
            f"--max_memory {max_memory / 2**30:.2f} GiB is too little: {word} allow {max(0, fits)} tokens, and the "
            f"largest pair has {largest}. Raise it by {more:.2f} GiB or lower --max_length."
        )
    if fits < largest and (limit := tightest_limit(device)) is not None:
        _refuse_hopeless(limit, model, largest, int(largest * per_token) + promised)
    if fits < largest:
        return Budget(
            largest,
            checkpointing,
            f"{word} would allow {fits}, but the largest pair has {largest} tokens and cannot be cut; if memory runs "
            f"out, lower --max_length{why}",
        )
    kind = kind_of(device)
    enough = max(SATURATING_TOKENS.get(kind, SATURATING_TOKENS_ELSEWHERE), largest)
    if fits < enough:
        return Budget(fits, checkpointing, word + why)
    return Budget(enough, checkpointing, f"{word} would allow {fits}; more than {enough} is no faster on {kind}{why}")


def _room(device: str, max_memory: int | None, promised: int) -> tuple[float, str]:
    """Bytes that activations may take beside what is `promised` already, and in words where that comes from."""
    free = max(0, available_memory(device) - promised)
    if max_memory is None:
        part = f" for each of {ranks_on_host()} ranks here" if device == "cpu" and ranks_on_host() > 1 else ""
        limit = tightest_limit(device)
        under = f" under {limit.name}" if limit is not None else ""
        return ACTIVATION_SHARE * free, f"{free / 2**30:.1f} GiB free{under}{part}"
    if device != "cpu":
        used = torch.get_device_module(device).memory_allocated(device) + promised
    else:
        used = psutil.Process().memory_info().rss + promised
    left = max_memory - used
    word = f"--max_memory leaves {max(left, 0) / 2**30:.2f} of {max_memory / 2**30:.2f} GiB"
    return min(left, ACTIVATION_SHARE * free), word


def _refuse_hopeless(limit: Limit, model: PreTrainedModel, largest: int, needed: int) -> None:
    """Refuse a run whose largest pair is above a limit with all memory that there is: it would be killed.

    Raises:
        SettingsError: with what would be needed.
    """
    if (free := available_memory(str(model.device))) < needed - reserved(model):
        more = (needed - free) / 2**30
        raise SettingsError(
            f"The largest pair has {largest} tokens and needs {needed / 2**30:.2f} GiB; {limit.name} "
            f"({limit.size / 2**30:.2f} GiB) leaves {free / 2**30:.2f}. Raise that limit by {more:.2f} GiB or lower "
            "--max_length."
        )


def choose_shape(budget: int, pairs: Sequence[Pair], pairs_per_step: int) -> Choice[Shape]:
    """The one shape that forests of at most `budget` tokens are padded to, from the sizes of `pairs`.

    An average step fills its forests evenly. Room for scored tokens and answers is a little above
    what they need then, so that tokens are what runs out first; the largest single pair always fits.
    """
    answers = [pair_size(p) - len(p.prompt_ids) for p in pairs]
    whole = [pair_size(p) for p in pairs]
    step = pairs_per_step * sum(whole) / len(pairs)
    even = 1.1 * step / math.ceil(step / budget)
    tokens = _rounded(max(min(budget, even), *whole))
    scored = min(tokens, _rounded(max(*answers, 1.15 * tokens * sum(answers) / sum(whole))))
    most = math.ceil(1.25 * tokens * len(pairs) / sum(whole))
    largest = max(2 + len(p.others) for p in pairs)
    shape = Shape(tokens, scored, largest * max(1, min(most, pairs_per_step)), largest)
    return Choice(shape, "asked for by --pad_max; every forest is padded to it, so that there is one shape to compile")


def _rounded(count: float, multiple: int = 128) -> int:
    return math.ceil(count / multiple) * multiple


def reserved(model: PreTrainedModel) -> int:
    """Bytes that nothing may be planned for: `RESERVE`, and logits of the head's chunks with their gradient."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return RESERVE + 2 * min(CHUNK_BYTES, 4 * vocabulary * SATURATING_TOKENS["cpu"])


def training_bytes(model: nn.Module) -> int:
    """Bytes that gradients and Adam's two moments of the trained weights are going to take."""
    return sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def kept_bytes(policy: Scorer) -> float:
    """Bytes that a token's activations take until the backward pass, found by scoring a small forest.

    A model whose weights are sharded gathers them for the pass, so there the difference of two forests
    counts, which holds no weights.
    """
    tokens = 192
    kept = _kept_of_forest(policy, tokens)
    if any(isinstance(parameter, DTensor) for parameter in policy.causal.parameters()):
        return (kept - _kept_of_forest(policy, tokens // 2)) / (tokens // 2)
    return kept / tokens


def _kept_of_forest(policy: Scorer, tokens: int) -> int:
    model = policy.causal
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(tokens) % vocabulary).tolist()
    forest = Forest.of([Bundle(tuple(ids[: tokens // 3]), (tuple(ids[tokens // 3 :]),), (0,))], device=model.device)
    weights = (
        each.to_local() if isinstance(each, DTensor) else each for each in (*model.parameters(), *model.buffers())
    )
    own = {each.untyped_storage().data_ptr() for each in weights}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would be a circle of graph and output that nothing collects, weights included

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = leaf_logprobs(policy, forest)  # held, so that no two storages have one address
    del scores
    return sum(found.values())


def kept_when_recomputing(model: PreTrainedModel, kept: float) -> float:
    """The same where each layer keeps its input only and one layer at a time is computed again."""
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    inputs = layers * int(config.hidden_size) * torch.empty(0, dtype=model.dtype).element_size()
    return inputs + (1 + TRANSIENT_LAYERS) * kept / layers
