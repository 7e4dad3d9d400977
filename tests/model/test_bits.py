"""In bfloat16 an answer's log-prob has the same bits whatever is computed beside it, and however its path is cut.

A preference loss subtracts two models' log-probs, which may come from other forests (a reference from the disk, a later
epoch): what rounding adds must be in both.
"""

from __future__ import annotations

import random

import pytest
import torch

from preftree.forest import Bundle, Forest, ScoreRequest
from preftree.model.score import attach
from preftree.model.stream import score_requests
from tests.support import tiny


def bundles() -> list[Bundle]:
    """Pairs whose prompts part early, late and never, over several blocks of rows and keys; and short ones."""
    rng = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(tiny.VOCABULARY) for _ in range(count))

    opening, middle = ids(75), ids(140)
    prompts = [opening + middle + ids(61), opening + middle + ids(3), opening + ids(20), ids(9), ids(2)]
    prompts.append(prompts[0])
    return [
        Bundle(prompt, (ids(rng.choice((1, 7, 150))), ids(rng.choice((2, 31, 230)))), (2 * i, 2 * i + 1))
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mpt", "mistral-window", "gemma2"])
@pytest.mark.parametrize("trained", [True, False])
def test_in_any_forest(family: str, trained: bool) -> None:
    model = tiny.with_lora(tiny.for_kernels(family).bfloat16())
    model.requires_grad_(trained)
    with attach(model) as scorer, torch.no_grad():
        if scorer.name != "native":
            pytest.skip(f"no compiled kernels here: {scorer.reason}")
        together = scorer(Forest.of(bundles())).by_leaf()
        answers = [
            Bundle(b.prompt, (c,), (i,)) for b in bundles() for c, i in zip(b.continuations, b.leaf_ids, strict=True)
        ]
        for forests in (
            [[bundle] for bundle in bundles()],
            [bundles()[:2], bundles()[2:]],
            [[answer] for answer in answers],
        ):
            for forest in forests:
                for leaf, logprob_S in scorer(Forest.of(forest)).by_leaf().items():
                    assert torch.equal(logprob_S, together[leaf])


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
def test_in_any_stretch_of_a_stream(family: str) -> None:
    asked = [ScoreRequest(bundle.prompt, answer) for bundle in bundles() for answer in bundle.continuations]
    with attach(tiny.for_kernels(family).bfloat16().requires_grad_(False)) as scorer:
        if scorer.name != "native":
            pytest.skip(f"no compiled kernels here: {scorer.reason}")
        whole, *others = (score_requests(scorer, asked, budget) for budget in (4096, 512, 97))
    assert all(other == whole for other in others)
