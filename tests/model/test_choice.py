"""Which backend a device gets: those that agree with the model, of them the fastest, and the reasons in words."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from preftree.forest import Forest
from preftree.model import score
from preftree.model.attention import BACKENDS, FOR_DEVICE, MEASURED, timing
from preftree.model.score import attach, leaf_logprobs
from tests.support import kernels, tiny
from tests.support.strategies import random_batch

LADDER = ("varlen", "flex", "masked")


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's CPU with the backends of a GPU."""
    monkeypatch.setitem(FOR_DEVICE, "cpu", LADDER)
    monkeypatch.setattr(score, "MEASURED", {"cpu"})
    monkeypatch.setattr(timing, "RUNS", 1)


def test_every_backend_that_is_offered_exists() -> None:
    assert {name for names in FOR_DEVICE.values() for name in names} <= set(BACKENDS)
    assert set(FOR_DEVICE) >= MEASURED


@pytest.mark.usefixtures("like_cuda")
@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])
def test_all_that_agree_are_timed_on_a_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    def seconds(attend: Any, query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Any) -> float:
        timed.append((attend, tuple(query.shape), rules))
        return {BACKENDS["flex"].attend: 0.002}.get(attend, 0.003)

    monkeypatch.setattr(timing, "seconds", seconds)
    model, oracle = (tiny.FAMILIES[family]().double() for _ in range(2))
    with kernels.on_cpu():
        scorer = attach(model)
        assert scorer.name == "flex"
        assert "varlen 3.00 ms, flex 2.00 ms, masked 3.00 ms" in scorer.reason
        assert "agrees with the model's plain forward" in scorer.reason
        assert [attend for attend, _, _ in timed] == [BACKENDS[name].attend for name in LADDER]
        size = getattr(model.config, "head_dim", None) or 8
        assert {shape for _, shape, _ in timed} == {(4, 2048, size)}
        assert all((rules.slopes_H is None) == (family != "mpt") for _, _, rules in timed)
        forest = Forest.of(random_batch(1))
        with torch.no_grad():
            found, expected = leaf_logprobs(scorer, forest).token_S, tiny.plain_logprobs(oracle, forest)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("like_cuda")
def test_what_cannot_run_is_passed_over_with_its_reason() -> None:
    """Without any stand-in: varlen has no kernel on a CPU, and the compiled kernel of flex cannot be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preftree.model.attention.flex._kernel", lambda device: None)
        scorer = attach(tiny.llama())
    assert scorer.name == "masked"
    assert scorer.reason.startswith("varlen: NotImplementedError: no variable-length attention on cpu; flex: TypeError")


def test_fixed_shapes_take_the_mask() -> None:
    assert attach(tiny.llama(), fixed_shapes=True).name == "masked"


def test_a_device_that_nobody_has_named_takes_the_mask() -> None:
    model = tiny.llama().to("meta")
    assert score._candidates(model, "auto", False) == (["masked", "padded", "plain"], [])


def test_ranks_should_choose_alike() -> None:
    """A later one has to be clearly faster."""
    assert timing.fastest({"a": 1.0, "b": 0.95, "c": 0.97}) == "a"
    assert timing.fastest({"a": 1.0, "b": 0.8, "c": 0.75}) == "b"
    assert timing.fastest({"a": 1.0, "b": 0.8, "c": 0.5}) == "c"


def test_seconds_are_the_shortest_of_several() -> None:
    forest = Forest.of(random_batch(1))
    pauses = iter((0.05, 0.0, 0.05, 0.0, 0.0))

    def slow(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Any) -> Tensor:
        time.sleep(next(pauses))
        return query * key * value

    tensor = torch.ones(1, len(forest), 2)
    assert 0 < timing.seconds(slow, tensor, tensor, tensor, forest, None) < 0.05  # type: ignore[arg-type]
    assert next(pauses, None) is None
