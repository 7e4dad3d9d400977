"""How long a backend takes for one layer's attention, forward and backward."""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor

from preftree.forest import Bundle, Forest
from preftree.model.attention import Attend, Rules

#: Tokens of `sample_forest`.
SAMPLE_TOKENS = 2048
#: Runs of which the shortest counts; the first ones compile and set up.
RUNS = 5
#: A later candidate has to be so much faster: ranks, and a run that is resumed, should choose alike.
MARGIN = 0.9


def sample_forest(device: torch.device, vocabulary: int) -> Forest:
    """Pairs as in training, `SAMPLE_TOKENS` in all: prompts of 256 tokens, answers of 192 and 64."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    pairs = SAMPLE_TOKENS // 512
    return Forest.of([Bundle(ids(256), (ids(192), ids(64)), (2 * i, 2 * i + 1)) for i in range(pairs)], device)


def seconds(
    attend: Attend, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules
) -> float:
    """Shortest of a few forward and backward passes."""
    leaves = [x.detach().requires_grad_() for x in (query_HTD, key_KTD, value_KTD)]
    times = []
    with torch.enable_grad():
        for _ in range(RUNS):
            _wait(forest.device)
            start = time.perf_counter()
            attend(leaves[0], leaves[1], leaves[2], forest, rules).sum().backward()
            _wait(forest.device)
            times.append(time.perf_counter() - start)
    return min(times)


def fastest(times: dict[str, float]) -> str:
    """The first name, unless a later one is clearly faster."""
    best, *others = times
    for name in others:
        if times[name] < MARGIN * times[best]:
            best = name
    return best


def described(times: dict[str, float]) -> str:
    """The measurement in words, "" if there is none."""
    words = ", ".join(f"{name} {1000 * taken:.2f} ms" for name, taken in times.items())
    return f"a layer's attention over {SAMPLE_TOKENS} tokens, forward and backward: {words}" if times else ""


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
