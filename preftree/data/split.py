"""A validation split that shares no prompt with the training pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from preftree.data.encode import EncodedPair


def split_validation(
    pairs: Sequence[EncodedPair], percentage: float, seed: int
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Training and validation pairs, both in their original order.

    `percentage` of the pairs (at least one, if it is above 0 and more than one prompt is there) are held out.
    All pairs of a prompt go to the same side: a prompt seen in training would flatter the validation.
    """
    prompts = list(dict.fromkeys(pair.prompt_ids for pair in pairs))
    if percentage <= 0 or len(prompts) < 2:
        return list(pairs), []
    wanted = max(1, round(len(pairs) * percentage / 100))
    counts: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        counts[pair.prompt_ids] = counts.get(pair.prompt_ids, 0) + 1
    random.Random(seed).shuffle(prompts)
    held_out: set[tuple[int, ...]] = set()
    held = 0
    for prompt in prompts[:-1]:  # one prompt at least stays for training
        if held >= wanted:
            break
        held_out.add(prompt)
        held += counts[prompt]
    train = [pair for pair in pairs if pair.prompt_ids not in held_out]
    return train, [pair for pair in pairs if pair.prompt_ids in held_out]
