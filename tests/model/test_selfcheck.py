"""What the check before scoring notices: small errors in half precision, and leaks below any tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.model.attention import BACKENDS, Backend, Rules
from preftree.model.score import attach
from preftree.model.selfcheck import of_model
from tests.support import families, tiny


def calm(dtype: torch.dtype) -> PreTrainedModel:
    """A model whose rounding in half precision costs little, as that of trained models does."""
    model = tiny.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model.to(dtype).requires_grad_(False).eval()


def leaking(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """Attention that lets a little of every token through to every other one."""
    out_THD = BACKENDS["dense"].attend(query, key, value, forest, rules)
    return out_THD + 1e-3 * value.sum(1).mean()


def skewed(by: float) -> Backend:
    """Attention that is wrong by a part of itself."""

    def attend(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
        return (1 + by) * BACKENDS["dense"].attend(query, key, value, forest, rules)

    return Backend(attend)


def test_a_leak_that_is_smaller_than_the_tolerance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "leaking", Backend(leaking))
    scorer = attach(tiny.llama().bfloat16().requires_grad_(False), "leaking")
    assert scorer.name == "padded"
    assert scorer.reason.startswith("leaking: ModelError: log-probs move by ")


def test_half_precision_has_no_fixed_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "skewed", skewed(by=0.2))  # much less than a quarter of a nat, more than rounding
    model = calm(torch.bfloat16)
    assert of_model(model).tolerance < 0.1
    scorer = attach(model, "skewed")
    assert scorer.name == "padded"
    assert scorer.reason.startswith(("skewed: log-probs off by 0.0", "skewed: ModelError: log-probs off by 0.0"))


def test_an_error_of_all_tokens_is_seen_below_the_noise_of_one() -> None:
    """Wrong by less than the largest of the noise, on average by more than its mean."""
    check = of_model(calm(torch.bfloat16))
    off = 1.1 * check.mean
    assert off < check.tolerance
    with pytest.raises(ModelError, match="on average over a test forest"):
        check.error(lambda forest: check.expected_S + off)
    assert check.error(lambda forest: check.expected_S + 0.8 * check.mean) < check.tolerance


def test_float32_is_held_to_its_own_noise_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "skewed", skewed(by=1e-3))
    model = calm(torch.float32)
    assert of_model(model).tolerance < 1e-4
    scorer = attach(model, "skewed")
    assert scorer.name == "padded"
    assert scorer.reason.startswith(("skewed: log-probs off by 0.000", "skewed: ModelError: log-probs off by "))


def test_products_in_tf32_are_no_error() -> None:
    model, before = calm(torch.float32), torch.get_float32_matmul_precision()
    exact = of_model(model).tolerance
    torch.set_float32_matmul_precision("high")
    try:
        assert of_model(model).tolerance > 5 * exact
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt_neox", "mpt"])
def test_honest_backends_pass_in_half_precision(family: str) -> None:
    model = tiny.FAMILIES[family]().bfloat16().requires_grad_(False)
    for path in ("auto", "tiles", "dense"):
        with attach(model, path) as scorer:
            assert scorer.shares_prompts, scorer.reason


def test_a_wrong_way_of_the_models_own_is_no_noise() -> None:
    """An encoder's padded and single sequences differ by nats, which says nothing about rounding."""
    model = families.tiny_model("bert").bfloat16().requires_grad_(False)
    with attach(model) as scorer:
        assert not scorer.shares_prompts, scorer.reason
