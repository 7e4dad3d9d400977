"""The short LoRA forward against PEFT's own, values and gradients."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from preftree.model.cpu import lora_linear
from preftree.model.cpu.lora_linear import patch_lora
from preftree.model.patch import Patches


def pair(bias: bool = False, **config: Any) -> tuple[PeftModel, PeftModel]:
    """The same adapted layers twice, the second one quick."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 4, bias=bias)).double()
    slow = get_peft_model(body, LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], **config))
    with torch.no_grad():
        for name, parameter in slow.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    quick = copy.deepcopy(slow)
    assert patch_lora(quick, Patches(quick)) == 2
    return slow, quick


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *trained])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (1, 6)])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_pefts_layer(bias: bool, shape: tuple[int, ...], rslora: bool) -> None:
    slow, quick = pair(bias, use_rslora=rslora)
    x = torch.randn(shape, dtype=torch.float64)
    with mock.patch.object(lora_linear, "_stock", side_effect=AssertionError("went the long way")):
        found = outcome(quick, x)
    for have, want in zip(found, outcome(slow, x), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["disabled", "dropout", "dora", "merged", "two adapters"])
def test_everything_else_goes_pefts_way(what: str) -> None:
    config: dict[str, Any] = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(what, {})
    slow, quick = pair(**config)
    x = torch.randn(4, 6, dtype=torch.float64)
    results = []
    for model in (slow, quick):
        if what == "merged":
            model.merge_adapter()
        if what == "two adapters":
            torch.manual_seed(1)
            model.add_adapter("more", model.peft_config["default"])
            model.base_model.set_adapter(["default", "more"])
        torch.manual_seed(2)
        with mock.patch.object(lora_linear._LoraLinear, "apply", side_effect=AssertionError("went the short way")):
            if what == "disabled":
                with model.disable_adapter():
                    results.append(model(x))
            else:
                results.append(model(x))
    assert torch.equal(*results)


def test_no_gradient_below_the_first_layer() -> None:
    _, quick = pair()
    x = torch.randn(4, 6, dtype=torch.float64)
    quick(x).sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for n, p in quick.named_parameters() if "lora_" in n)


def test_bfloat16_weights_with_float32_masters() -> None:
    slow, quick = pair()
    exact = copy.deepcopy(slow)
    for model in (slow, quick):
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    x = torch.randn(64, 6)
    want = outcome(exact, x.bfloat16().double())
    have = outcome(quick, x.bfloat16())
    pefts = outcome(slow, x.bfloat16())
    assert have[0].dtype == torch.bfloat16
    assert {g.dtype for g in have[2:]} == {torch.float32}
    for mine, theirs, exactly in zip(have, pefts, want, strict=True):
        error, allowed = (float((g.double() - exactly).norm()) for g in (mine, theirs))
        assert error <= 3 * allowed + 0.02 * float(exactly.norm())
