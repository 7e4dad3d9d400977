"""The routers' loss of each pair, against the family's own code on that pair alone, padded as TRL pads it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from preftree.forest import Bundle, Forest
from preftree.model.lora import add_lora
from preftree.model.router import RouterLoss
from preftree.model.score import attach, leaf_logprobs
from tests.support import families, tiny

SHARED = tuple(range(5, 25))
BUNDLES = [
    Bundle((*SHARED, 30, 31), ((40, 41, 42), (43,)), (0, 1)),
    Bundle(SHARED, ((50, 51), (52, 53, 54, 55)), (2, 3)),
]


def mixture(asks: bool = True) -> nn.Module:
    model = families.tiny_model("mixtral")
    model.config.output_router_logits = asks
    model.config.router_aux_loss_coef = 0.5
    return add_lora(model, rank=4)


def by_the_models_own_code(model: nn.Module, bundle: Bundle) -> Tensor:
    sequences = [bundle.prompt + answer for answer in bundle.continuations]
    longest = max(map(len, sequences))
    ids_BN = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
    mask_BN = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    return model(input_ids=ids_BN, attention_mask=mask_BN, output_router_logits=True, use_cache=False).aux_loss


@pytest.mark.parametrize("attention", ["auto", "padded", "plain"])
@pytest.mark.parametrize("together", [True, False], ids=["one forest", "a forest per pair"])
def test_losses_and_gradients_are_those_of_each_pair_alone(attention: str, together: bool) -> None:
    model = mixture()
    expected_P = torch.stack([by_the_models_own_code(model, bundle) for bundle in BUNDLES])
    expected = torch.autograd.grad(
        expected_P[0] - 2 * expected_P[1], list(tiny.trained(model).values()), allow_unused=True
    )
    with attach(model, attention) as scorer:
        assert scorer.shares_prompts == (attention == "auto")
        router = RouterLoss.of(scorer)
        assert router is not None
        parts = []
        for bundles in [BUNDLES] if together else [[bundle] for bundle in BUNDLES]:
            forest = Forest.of(bundles)
            names = sorted(forest.leaf_ids)
            pairs = [
                [forest.leaf_of_id[forest.leaf_ids.index(n)] for n in names[i : i + 2]] for i in range(0, len(names), 2)
            ]
            with router.recording() as passes:
                leaf_logprobs(scorer, forest)
            parts.append(router.losses(passes, forest, pairs))
    found_P = torch.cat(parts)
    torch.testing.assert_close(found_P, 0.5 * expected_P)
    found = torch.autograd.grad(
        2 * (found_P[0] - 2 * found_P[1]), list(tiny.trained(model).values()), allow_unused=True
    )
    seen = 0
    for want, have in zip(expected, found, strict=True):
        assert (want is None) == (have is None)
        if want is not None:
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-6)
            seen += int(want.abs().sum() > 0)
    assert seen > 10


def test_only_for_mixtures_that_ask_for_it() -> None:
    for model in (mixture(asks=False), tiny.llama()):
        with attach(model) as scorer:
            assert RouterLoss.of(scorer) is None
