"""How many tokens a forest may hold: as many as memory allows, up to where more brings no speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from preftree.device import Choice, available_memory
from preftree.forest import Pair, Shape

#: Tokens after which a forest is no faster: GEMMs are large enough by then.
ENOUGH = {"cpu": 2048, "cuda": 16384}
#: Elsewhere attention takes a mask of tokens x tokens, whose cost overtakes the GEMMs'.
ENOUGH_ELSEWHERE = 4096
#: Share of the memory that is free now which activations may take.
SHARE = 0.6


def choose_budget(
    model: PreTrainedModel, pairs: Sequence[Pair], *, device: str, checkpointing: bool, asked: int | None
) -> Choice[int]:
    """Tokens of a forest, with the reason. `pairs` only say how large the largest single pair is."""
    if asked is not None:
        return Choice(asked, "asked for by --tokens_per_forest")
    kind = device.partition(":")[0]
    per_token = bytes_per_token(model, checkpointing)
    free = available_memory(device)
    fits = int(SHARE * free / per_token)
    enough = ENOUGH.get(kind, ENOUGH_ELSEWHERE)
    largest = max(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    word = f"{free / 2**30:.1f} GiB free, about {per_token / 2**10:.0f} KiB a token"
    if fits < largest:
        return Choice(
            largest,
            f"{word} would allow {fits}, but the largest pair has {largest} tokens and cannot be cut; if "
            "memory runs out, lower --max_length or add --gradient_checkpointing true",
        )
    if fits < enough:
        return Choice(fits, word)
    return Choice(max(enough, largest), f"{word} would allow {fits}; more than {enough} is no faster on {kind}")


def choose_shape(budget: int, pairs: Sequence[Pair], pairs_per_step: int) -> Choice[Shape]:
    """The one shape that forests of at most `budget` tokens are filled up to, from the sizes of `pairs`.

    So many tokens that an average step fills its forests evenly. Room for scored tokens and answers is a little above
    what they need then, so that tokens are what runs out first; the largest single pair always fits.
    """
    answers = [len(p.chosen_ids) + len(p.rejected_ids) for p in pairs]
    whole = [len(p.prompt_ids) + n for p, n in zip(pairs, answers, strict=True)]
    step = pairs_per_step * sum(whole) / len(pairs)
    even = 1.1 * step / math.ceil(step / budget)
    tokens = _rounded(max(min(budget, even), *whole))
    scored = min(tokens, _rounded(max(*answers, 1.15 * tokens * sum(answers) / sum(whole))))
    most = math.ceil(1.25 * tokens * len(pairs) / sum(whole))
    shape = Shape(tokens, scored, 2 * max(1, min(most, pairs_per_step)))
    return Choice(
        shape, "asked for by --pad_max; every forest is filled up to it, so that there is one shape to compile"
    )


def _rounded(count: float, multiple: int = 128) -> int:
    return math.ceil(count / multiple) * multiple


def bytes_per_token(model: PreTrainedModel, checkpointing: bool) -> int:
    """Estimated activation memory of one token kept for the backward pass.

    A layer keeps about ten tensors of the hidden size (norms, residuals, query, key, value and their rotated
    copies, attention output) and four of the intermediate size, twice the latter where LoRA sits on it.
    """
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layers = int(config.num_hidden_layers)
    layer = 12 * hidden + 5 * inner
    kept = layers * hidden + layer if checkpointing else layers * layer
    return kept * torch.empty(0, dtype=model.dtype).element_size()
