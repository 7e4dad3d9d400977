"""One conformance suite over the real architectures: the tree path is the model, in values and gradients.

Everything in float64 against the model's own logits on single sequences. What float64 cannot fix are casts
inside the models: norms in float32 (gradients), eager softmax in float32 (Gemma 2 and MPT have no other).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.forest import Bundle, Forest
from preftree.model.attention import FOR_DEVICE
from preftree.model.score import Scorer, attach, leaf_logprobs
from tests.support import tiny
from tests.support.strategies import random_batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EAGER_ONLY = ("gemma2", "mpt", "mpt-6-heads", "mpt-clip_qkv")
SEEDS = (0, 1)
TARGETS = {
    "phi3": ["qkv_proj"],
    "phi3-window": ["qkv_proj", "down_proj"],
    "gpt_neox": ["query_key_value"],
    "mpt": ["Wqkv"],
    "mpt-6-heads": ["Wqkv", "out_proj"],
    "mpt-clip_qkv": ["Wqkv", "down_proj"],
}
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def value_tolerance(family: str) -> float:
    return 1e-5 if family in EAGER_ONLY else 1e-11


def gradient_tolerance(family: str) -> float:
    """Relative to each gradient's largest entry; a float32 cast in the backward pass costs some 1e-7."""
    return 1e-11 if family == "gpt_neox" else 1e-5 if family in EAGER_ONLY else 2e-6


def pair_of_models(family: str, **lora: Any) -> tuple[PeftModel, PeftModel]:
    """Twice the same model: one to attach, and an untouched one as the oracle."""
    make: Callable[[], PreTrainedModel] = tiny.FAMILIES[family]
    return tiny.with_lora(make().double(), **lora), tiny.with_lora(make().double(), **lora)


def long_tail() -> list[Bundle]:
    """Paths of 45 tokens and more: many windows long, with a fork far from the root."""
    trunk = tuple(range(1, 31))
    return [
        Bundle((*trunk, 40, 41), (tuple(range(60, 75)), (3,)), (0, 1)),
        Bundle((*trunk, 50), ((3,), tuple(range(70, 82))), (2, 3)),
    ]


def forests() -> list[Forest]:
    return [Forest.of(bundles) for bundles in (*map(random_batch, SEEDS), long_tail())]


def assert_conforms(scorer: Scorer, oracle: nn.Module, family: str, trees: list[Forest]) -> None:
    model = scorer.model
    for forest in trees:
        found = leaf_logprobs(scorer, forest).token_S
        expected = tiny.plain_logprobs(oracle, forest)
        assert float(expected.detach().std()) > 0.1  # no flat model, to which masks are all one
        tolerance = value_tolerance(family)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        error = tiny.relative_error(tiny.gradients(model, found), tiny.gradients(oracle, expected))
        assert error <= gradient_tolerance(family)


@families
def test_the_tree_is_the_model(family: str) -> None:
    model, oracle = pair_of_models(family)
    scorer = attach(model)
    assert scorer.name == "tiles", scorer.reason
    assert scorer.shares_prompts
    assert scorer.reason.startswith("agrees with the model's plain forward")
    assert_conforms(scorer, oracle, family, forests())


@families
def test_named_targets(family: str) -> None:
    targets = TARGETS.get(family, ["q_proj", "v_proj", "down_proj"])
    model, oracle = pair_of_models(family, target_modules=targets)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tiny.trained(model)}
    assert adapted == set(targets)
    scorer = attach(model)
    assert scorer.name == "tiles"
    assert_conforms(scorer, oracle, family, [Forest.of(random_batch(2))])


@families
def test_checkpointing_changes_nothing(family: str) -> None:
    model, _ = pair_of_models(family)
    scorer = attach(model)
    model.train()
    forest = Forest.of(random_batch(1))
    plain = leaf_logprobs(scorer, forest).token_S
    plain_gradients = tiny.gradients(model, plain)

    ran: list[int] = []
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    # On something inside the layer: its own hooks stay outside of what is replayed.
    next(layers[0].children()).register_forward_pre_hook(lambda *_: ran.append(1))
    tiny.checkpoint(model)
    checkpointed = leaf_logprobs(scorer, forest).token_S
    found = tiny.gradients(model, checkpointed)
    assert len(ran) == 2  # in the forward pass and again in the backward: it was switched on indeed
    assert torch.equal(checkpointed, plain)
    for name, expected in plain_gradients.items():
        assert torch.equal(found[name], expected), name


@families
def test_the_model_itself_stays_as_it_was(family: str) -> None:
    """Plain forwards, left-padded batches and generation go on after attaching as before."""
    # Float32: in float64 stock eager attention makes NaN of a padding token's fully masked row.
    model = pair_of_models(family)[0].float()
    random = torch.Generator().manual_seed(4)
    ids_BN = torch.randint(3, tiny.VOCABULARY, (2, 14), generator=random)
    mask_BN = torch.ones_like(ids_BN)
    mask_BN[0, :6] = 0  # as generation in batches pads

    @torch.no_grad()
    def outputs() -> list[Tensor]:
        logits = model(input_ids=ids_BN).logits
        padded = model(input_ids=ids_BN, attention_mask=mask_BN).logits[mask_BN.bool()]
        # eos would end the comparison early
        words = model.generate(
            input_ids=ids_BN, attention_mask=mask_BN, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        return [logits, padded, words]

    before = outputs()
    scorer = attach(model)
    leaf_logprobs(scorer, Forest.of(random_batch(0))).token_S.sum().backward()
    # Kernels may stand in for norms and activations, which is the same to rounding.
    torch.testing.assert_close(outputs(), before, rtol=1e-4, atol=1e-4)


PATHS = [
    *[(family, "padded") for family in tiny.FAMILIES],
    *[(family, path) for family in ("llama", "gemma2", "mpt") for path in ("dense", "plain")],
]


@pytest.mark.parametrize(("family", "path"), PATHS, ids="-".join)
def test_every_path_gives_the_same(family: str, path: str) -> None:
    model, oracle = pair_of_models(family)
    if (family, path) == ("gemma2", "padded"):
        # In float64 stock eager attention makes NaN of the padding's fully masked rows (window < padding).
        model, oracle = model.float(), oracle.float()
    scorer = attach(model, path)
    assert scorer.name == path, scorer.reason
    assert scorer.shares_prompts == (path == "dense")
    forest = Forest.of(random_batch(1, bundles=3))
    found = leaf_logprobs(scorer, forest).token_S
    expected = tiny.plain_logprobs(oracle, forest)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=value_tolerance(family))
    error = tiny.relative_error(tiny.gradients(model, found), tiny.gradients(oracle, expected))
    assert error <= gradient_tolerance(family)


@families
def test_bfloat16_is_as_good_as_the_models_own(family: str) -> None:
    """Against float64 on the same rounded weights: not far above what the model's plain bfloat16 loses."""
    # Large random weights amplify rounding from layer to layer; two layers' worth of spread is enough here.
    model = tiny.FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model = model.bfloat16()
    exact = tiny.FAMILIES[family]()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    forest = Forest.of(random_batch(1, bundles=8))
    with torch.no_grad():
        oracle = tiny.plain_logprobs(exact, forest)
        own = (tiny.plain_logprobs(model, forest) - oracle).abs()
        scorer = attach(model)
        assert scorer.name in FOR_DEVICE["cpu"], scorer.reason
        logprobs = leaf_logprobs(scorer, forest).token_S
    assert logprobs.dtype == torch.float32  # whatever the model is in
    error = (logprobs.double() - oracle).abs()
    assert float(error.mean()) <= 2 * float(own.mean())
    assert float(error.max()) <= 3 * float(own.max())
