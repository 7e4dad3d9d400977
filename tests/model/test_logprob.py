"""The fused head against log_softmax, and the promise that nothing of (all rows × vocabulary) ever exists."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from preftree.model import logprob
from preftree.model.cpu import linear
from preftree.model.logprob import Head, TokenStats, token_logprobs

ROWS, HIDDEN, VOCABULARY = 23, 16, 61


class Wrapped(nn.Linear):
    """A linear layer that is not exactly one, like PEFT's: its gradient has to go through autograd."""


def make_head(kind: str, *, dtype: torch.dtype = torch.float64, vocabulary: int = VOCABULARY) -> Head:
    layer = Wrapped if kind == "wrapped" else nn.Linear
    module = layer(HIDDEN, vocabulary, bias="bias" in kind, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    module.requires_grad_("trained" in kind)
    return {
        "plain": Head(module),
        "bias": Head(module),
        "scale": Head(module, scale=0.3),
        "softcap": Head(module, softcap=2.0),
        "scale and softcap": Head(module, scale=1.7, softcap=3.0),
        "wrapped": Head(module, scale=0.3, softcap=2.0),
        "trained": Head(module, scale=0.3),
        "trained with bias": Head(module),
        "trained with softcap": Head(module, scale=0.3, softcap=2.0),
    }[kind]


KINDS = [
    *("plain", "bias", "scale", "softcap", "scale and softcap", "wrapped"),
    *("trained", "trained with bias", "trained with softcap"),
]


def expected_logprobs(hidden_SD: Tensor, target_S: Tensor, head: Head) -> Tensor:
    logits_SV = head.module(hidden_SD) * head.scale
    if head.softcap is not None:
        logits_SV = head.softcap * torch.tanh(logits_SV / head.softcap)
    return torch.log_softmax(logits_SV, -1)[torch.arange(len(target_S)), target_S]


def problem(
    dtype: torch.dtype = torch.float64, rows: int = ROWS, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor]:
    hidden_SD = torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden_SD, torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("chunk", [1, 5, ROWS - 1, ROWS, ROWS + 1, 1000], ids=lambda rows: f"{rows} rows a chunk")
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "CHUNK_BYTES", 4 * VOCABULARY * chunk)
    head = make_head(kind)
    assert head.fusable == (kind != "wrapped" and "trained" not in kind)
    assert head.trained == (kind in ("trained", "trained with bias"))
    hidden, target = problem()
    leaves = [hidden, *(p for p in head.module.parameters() if p.requires_grad)]
    assert len(leaves) == 1 + ("trained" in kind) + (kind == "trained with bias")
    found, expected = token_logprobs(hidden, target, head), expected_logprobs(hidden, target, head)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    for have, want in zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True
    ):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(hidden, target, head), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_at_all(kind: str) -> None:
    head = make_head(kind)
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    found = token_logprobs(hidden, torch.zeros(0, dtype=torch.long), head)
    assert found.shape == (0,)
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, views of what was there before included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_rows_times_vocabulary(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary, chunk = 200, 1000, 7
    monkeypatch.setattr(logprob, "CHUNK_BYTES", 4 * vocabulary * chunk)
    head = make_head(kind, dtype=torch.float32, vocabulary=vocabulary)
    hidden, target = problem(torch.float32, rows, vocabulary)
    linear.is_faster(torch.float32)  # compares products the first time
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = token_logprobs(hidden, target, head)
    # Autograd's own thread runs no dispatch mode from here, except on the CPU, where it is this thread.
    with Largest() as backward:
        out.sum().backward()
    weight = HIDDEN * vocabulary  # may be seen as a view of itself, or as its own gradient
    assert chunk * vocabulary <= forward.elements <= max(chunk * vocabulary, weight)
    assert 0 < backward.elements <= max(chunk * vocabulary, weight)
    assert max(kept) <= max(rows * HIDDEN, weight)
    if head.fusable:
        assert sum(kept) == rows * HIDDEN  # the slope alone
        assert backward.elements <= rows * HIDDEN  # and nothing is computed again


def test_the_check_of_sizes_notices() -> None:
    head = make_head("plain", dtype=torch.float32, vocabulary=1000)
    hidden, target = problem(torch.float32, 200, 1000)
    with Largest() as forward:
        expected_logprobs(hidden, target, head)
    assert forward.elements == 200 * 1000


@pytest.mark.parametrize("kind", ["plain", "trained"])
def test_bfloat16_accumulates_in_float32(kind: str) -> None:
    """Over a vocabulary of 50000, bfloat16 logits cost 2^-8 of a logit; a bfloat16 softmax would cost far more."""
    vocabulary = 50_000
    head = make_head(kind, dtype=torch.bfloat16, vocabulary=vocabulary)
    hidden, target = problem(torch.bfloat16, 40, vocabulary)
    exact_head = Head(copy.deepcopy(head.module).double(), head.scale)
    exact_hidden = hidden.detach().double().requires_grad_()
    oracle = expected_logprobs(exact_hidden, target, exact_head)
    found = token_logprobs(hidden, target, head)
    assert found.dtype == torch.float32

    raw = head.scale * head.module(hidden).detach()
    rounding = float((raw.double() - head.scale * exact_head.module(exact_hidden)).detach().abs().max())
    error = (found.double() - oracle).abs().detach()
    assert float(error.max()) <= 2 * rounding + 1e-5  # the target's own rounding, and the sum's average of it
    low = torch.log_softmax(raw, -1)[torch.arange(40), target]
    assert float(error.mean()) < 0.5 * float((low.double() - oracle).detach().abs().mean())

    weight = torch.randn(40)
    sides = ((hidden, head), (exact_hidden, exact_head))
    leaves = [[x, *(p for p in each.module.parameters() if p.requires_grad)] for x, each in sides]
    have_all = torch.autograd.grad(found, leaves[0], weight)
    want_all = torch.autograd.grad(oracle, leaves[1], weight.double())
    assert len(have_all) == (2 if kind == "trained" else 1)
    for have, want in zip(have_all, want_all, strict=True):
        assert have.dtype == torch.bfloat16
        assert float((have.double() - want).norm() / want.norm()) < 0.02


def test_a_target_that_is_certain_and_one_that_is_impossible() -> None:
    head = Head(nn.Linear(HIDDEN, 3, bias=False).requires_grad_(False))
    with torch.no_grad():
        head.module.weight.copy_(torch.tensor([[400.0], [0.0], [-400.0]]).expand(3, HIDDEN))  # type: ignore[operator, union-attr]
    hidden = torch.ones(3, HIDDEN, requires_grad=True)
    found = token_logprobs(hidden, torch.tensor([0, 1, 2]), head)
    assert found.tolist() == [0.0, -400.0 * HIDDEN, -800.0 * HIDDEN]
    found.sum().backward()
    assert bool(hidden.grad.isfinite().all())  # type: ignore[union-attr]


def test_autocast_does_not_reach_the_softmax() -> None:
    """Vendors differ in what autocast runs in bfloat16; log-probs are float32 whatever it does."""
    head = make_head("plain", dtype=torch.float32)
    hidden, target = problem(torch.float32)
    expected = token_logprobs(hidden, target, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.module(hidden).dtype == torch.bfloat16  # what it would have been
        assert torch.equal(token_logprobs(hidden, target, head), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("kind", ["frozen", "biased", "trained", "capped"])
def test_statistics_are_those_of_the_logits(kind: str, grad: bool) -> None:
    """Entropy, mean logit, top-1 and collision beside log-probs, against logits written out."""
    torch.manual_seed(0)
    module = nn.Linear(16, 50, bias=kind == "biased").double().requires_grad_(kind == "trained")
    head = Head(module, scale=0.7, softcap=3.0 if kind == "capped" else None)
    hidden = (3 * torch.randn(9, 16, dtype=torch.float64)).requires_grad_(grad)
    with torch.no_grad():
        logits = head.logits(hidden)
        target = torch.where(torch.arange(9) % 3 == 0, logits.argmax(1), torch.randint(50, (9,)))
        logp = logits.log_softmax(1)
    stats = TokenStats(collision=True)
    with torch.set_grad_enabled(grad):
        found = token_logprobs(hidden, target, head, stats)
    if grad:
        found.sum().backward()
    torch.testing.assert_close(stats.entropy_S, -(logp.exp() * logp).sum(1))
    torch.testing.assert_close(stats.mean_logit_S, logits.mean(1))
    torch.testing.assert_close(stats.top1_S, (logits.argmax(1) == target).double())
    torch.testing.assert_close(stats.collision_S, logp.exp().square().sum(1).log())
    assert 0 < float(stats.top1_S.mean()) < 1
