"""Backends and families on every kind of device that this machine has, against float64 on the CPU.

The CPU is among them, so that the tests themselves are tested; the others skip, visibly, where they are not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from preftree.forest import Forest, Shape, pad_forest
from preftree.model.attention import BACKENDS, FOR_DEVICE, Rules
from preftree.model.score import attach, leaf_logprobs
from tests.support import tiny
from tests.support.strategies import random_batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _is_here(kind: str) -> bool:
    backend = getattr(torch, kind, None)
    return kind == "cpu" or (backend is not None and backend.is_available())


DEVICES = [
    pytest.param(kind, marks=pytest.mark.skipif(not _is_here(kind), reason=f"no {kind} device"))
    for kind in ("cpu", "cuda", "mps", "xpu", "hpu")
]
on_devices = pytest.mark.parametrize("device", DEVICES)
#: One layer's attention in bfloat16, and in float32 where tensor cores may round inputs to 10 bits.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 6e-2}


def _offered(device: str, dtype: torch.dtype) -> list[str]:
    names = FOR_DEVICE.get(device, ("masked",))
    return [
        n for n in names if (n != "varlen" or dtype == torch.bfloat16) and (n != "native" or dtype != torch.bfloat16)
    ]


@on_devices
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", ["plain", "window", "alibi", "softcap"])
def test_attention(device: str, dtype: torch.dtype, rule: str) -> None:
    """Values and gradients of every backend that the device is offered, over segments of several blocks."""
    forest_cpu = Forest.of(random_batch(7, bundles=12, longest=120, answer=60))
    forest = Forest.of(random_batch(7, bundles=12, longest=120, answer=60), device)
    made: dict[str, Any] = {"window": 20} if rule == "window" else {"softcap": 2.0} if rule == "softcap" else {}
    slopes_H = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if rule == "alibi" else None
    random = torch.Generator().manual_seed(0)
    rounded = [torch.randn(heads, len(forest), 64, generator=random).to(dtype) for heads in (4, 2, 2)]
    weight = torch.randn(len(forest), 4, 64, generator=random)

    def run(name: str, where: Forest, inputs: list[Tensor], slopes: Tensor | None) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = BACKENDS[name].attend(leaves[0], leaves[1], leaves[2], where, Rules(0.125, slopes_H=slopes, **made))
        return [out.detach(), *torch.autograd.grad((out * weight.to(out)).sum(), leaves)]

    expected = run("dense", forest_cpu, [x.double() for x in rounded], slopes_H)
    for name in _offered(device, dtype):
        if name == "varlen" and rule in ("alibi", "softcap"):
            pytest.importorskip("flash_attn")
        found = run(name, forest, [x.to(device) for x in rounded], None if slopes_H is None else slopes_H.to(device))
        for have, want in zip(found, expected, strict=True):
            scale = float(want.abs().max())
            assert float((have.cpu().double() - want).abs().max()) < TOLERANCE[dtype] * max(scale, 1.0), name


@on_devices
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "mpt"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "fixed shape"])
def test_families(device: str, family: str, padded: bool) -> None:
    """Log-probs and LoRA gradients of the path that the device chooses by itself."""
    model, oracle = tiny.with_lora(tiny.FAMILIES[family]()), tiny.with_lora(tiny.FAMILIES[family]().double())
    model = model.to(device)
    scorer = attach(model, fixed_shapes=padded)
    assert scorer.shares_prompts, scorer.reason
    forest = Forest.of(random_batch(1))
    expected = tiny.plain_logprobs(oracle, forest)
    if padded:
        forest = pad_forest(forest, Shape(len(forest) + 10, len(forest.target_S) + 5, len(forest.leaf_ids) + 4))
    token_S = leaf_logprobs(scorer, forest.to(device)).token_S[: len(expected)]
    assert float((token_S.cpu().double() - expected).detach().abs().max()) < 0.05
    found, wanted = tiny.gradients(model, token_S.cpu()), tiny.gradients(oracle, expected)
    assert tiny.relative_error({name: x.cpu().double() for name, x in found.items()}, wanted) < 0.05
