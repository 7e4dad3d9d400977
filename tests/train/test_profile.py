"""The step's profile: every operation has a kind, and what an attention calls is attention."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from preftree.forest import Forest
from preftree.model.score import attach, leaf_logprobs
from preftree.train.profile import OTHER, StepProfile, by_kind, kind_of
from tests.support import tiny
from tests.support.strategies import random_batch


def event(*names: str) -> SimpleNamespace:
    """An operation and its callers, innermost first."""
    caller = None
    for name in reversed(names):
        caller = SimpleNamespace(name=name, cpu_parent=caller)
    assert caller is not None
    return caller


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("aten::mm", "aten::matmul"), "projections"),
        (("aten::mm", "aten::linear", "_FusedLogprobs"), "head"),
        (("aten::bmm", "_TileAttention"), "attention"),
        (("_KernelAttentionBackward",), "attention"),
        (("aten::mm", "_LoraLinear"), "projections with LoRA"),
        (("aten::mul_", "Optimizer.step#AdamW.step"), "optimizer"),
        (("aten::mul",), "elementwise"),
        (("aten::view",), OTHER),
    ],
)
def test_kinds(names: tuple[str, ...], kind: str) -> None:
    assert kind_of(event(*names)) == kind


def test_a_real_pass_is_accounted_for() -> None:
    model = tiny.with_lora(tiny.llama().float())
    scorer = attach(model)
    forest = Forest.of(random_batch(0, bundles=6))
    with profile(activities=[ProfilerActivity.CPU]) as running:
        leaf_logprobs(scorer, forest).token_S.sum().backward()
    found = by_kind(list(running.events() or []))
    assert {"head", "attention", "projections with LoRA"} <= set(found)
    assert all(seconds >= 0 for seconds in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_second_step_is_profiled_and_no_other() -> None:
    console = Console(record=True, width=80)
    callback, args = StepProfile(console), mock.Mock(device=torch.device("cpu"))
    for step in range(3):
        callback.on_step_begin(args, mock.Mock(global_step=step), mock.Mock())
        assert (callback.running is not None) is (step == 1)
        torch.ones(8, 8) @ torch.ones(8, 8)
        callback.on_step_end(args, mock.Mock(global_step=step + 1), mock.Mock())
    assert console.export_text().count("kind of layer") == 1
