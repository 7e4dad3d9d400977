"""Kernels for norms and gated activations against the modules they stand in for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from preftree.errors import DeviceError
from preftree.forest import Forest
from preftree.model.cpu import kernels as native
from preftree.model.cpu import linear
from preftree.model.cpu.fused import fuse
from preftree.model.patch import Patches
from preftree.model.score import attach, leaf_logprobs
from tests.support import tiny
from tests.support.strategies import random_batch

try:
    native.library()
except DeviceError as problem:
    pytestmark = pytest.mark.skip(reason=str(problem))


def fused_names(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"LlamaMLP", "LlamaRMSNorm"}),
        ("qwen3", {"Qwen3MLP", "Qwen3RMSNorm"}),
        ("gemma2", set()),  # its norm adds one to the weight, its gate is a gelu
        ("gpt_neox", set()),
        ("mpt", set()),
    ],
)
def test_what_agrees_is_fused(family: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_faster", lambda dtype: False)
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny.FAMILIES[family]().to(dtype).requires_grad_(False)
        count = fuse(model, patches := Patches(model))
        assert fused_names(model) == expected
    assert bool(count) is bool(expected)
    patches.undo()
    assert not fused_names(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_frozen_linear_layers_take_the_faster_product(monkeypatch: pytest.MonkeyPatch) -> None:
    if not linear.packs(torch.float32):
        pytest.skip("this torch has no oneDNN product for float32")
    monkeypatch.setattr(linear, "mkl_is_held_back", lambda: True)
    model = tiny.FAMILIES["gpt_neox"]().float().requires_grad_(False)
    fuse(model, Patches(model))
    assert fused_names(model) == {"Linear"}


def test_trained_layers_have_the_modules_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers with and without a bias, norms and gated activations, through a whole model."""
    if not linear.packs(torch.float32):
        pytest.skip("this torch has no oneDNN product for float32")
    monkeypatch.setattr(linear, "mkl_is_held_back", lambda: True)
    for family, names in (("llama", {"Linear", "LlamaMLP", "LlamaRMSNorm"}), ("gpt_neox", {"Linear"})):
        torch.manual_seed(0)
        model = tiny.FAMILIES[family]().float().eval()
        own = copy.deepcopy(model)
        fuse(model, Patches(model))
        assert fused_names(model) == names
        ids = torch.randint(3, tiny.VOCABULARY, (2, 40))
        for each in (model, own):
            each(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 5].sum().backward()
        for (name, mine), theirs in zip(model.named_parameters(), own.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_what_a_trained_gate_multiplies_is_not_kept() -> None:
    (mlp, *_) = (each for each in tiny.llama().float().modules() if type(each).__name__ == "LlamaMLP")
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    fuse(mlp, Patches(mlp))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(torch.randn(7, 32))
    assert kept.count((7, mlp.gate_proj.out_features)) == 2  # gate and up


def test_weights_are_packed_where_there_is_room_and_released() -> None:
    if not linear.packs(torch.float32):
        pytest.skip("this torch has no packed product for float32")
    model = tiny.with_lora(tiny.llama().float())
    weights = [m.weight for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    assert "in the order of oneDNN's products" in attach(model, room=2**40).reason
    assert all(linear.packed(weight) is not None for weight in weights)
    assert "weights in one order: copies would take" in attach(model, room=1).reason
    assert all(linear.packed(weight) is None for weight in weights)


def test_packed_or_not_scores_and_gradients_are_the_same() -> None:
    model = tiny.with_lora(tiny.llama().float())
    forest = Forest.of(random_batch(4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for room in (2**40, None):
        scorer = attach(model, room=room)
        token_S = leaf_logprobs(scorer, forest).token_S
        with torch.no_grad(), model.disable_adapter():
            reference_S = leaf_logprobs(scorer, forest).token_S
        found.append([token_S.detach(), reference_S, *torch.autograd.grad(token_S.sum(), trained)])
    for packed, plain in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_an_adapter_merged_after_packing_counts() -> None:
    model = tiny.with_lora(tiny.llama().float())
    forest = Forest.of(random_batch(4))
    scorer = attach(model, room=2**40)
    with torch.no_grad():
        apart = leaf_logprobs(scorer, forest).token_S
        model.merge_adapter()
        merged = leaf_logprobs(scorer, forest).token_S
        model.unmerge_adapter()
        again = leaf_logprobs(scorer, forest).token_S
        with model.disable_adapter():
            reference = leaf_logprobs(scorer, forest).token_S
    assert not torch.allclose(apart, reference, atol=1e-3)
    for found in (merged, again):
        torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)


def outcome(module: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    (grad,) = torch.autograd.grad((out * weight.to(out.dtype)).sum(), x)
    return [out.detach(), grad]


@pytest.mark.parametrize("kind", ["LlamaMLP", "LlamaRMSNorm"])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(kind: str, spread: float, dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype).requires_grad_(False)
    exact = copy.deepcopy(model).double()
    fuse(model, Patches(model))
    (mine, *_), (truth, *_) = ([m for m in each.modules() if type(m).__name__ == kind] for each in (model, exact))
    own = copy.deepcopy(truth).to(dtype)
    x, weight = (spread * torch.randn(2, 7, 32)).to(dtype), torch.randn(2, 7, 32).to(dtype)
    want = outcome(truth, x.double(), weight)
    for have, theirs, exactly in zip(outcome(mine, x, weight), outcome(own, x, weight), want, strict=True):
        allowed = float((theirs - exactly).abs().max())  # what the module itself loses in this dtype
        assert float((have - exactly).abs().max()) <= 4 * allowed + torch.finfo(dtype).eps * float(exactly.abs().max())


@pytest.mark.parametrize("rows", [1, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_norm_has_the_gradient_of_its_weight(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = tiny.llama().to(dtype)
    own, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse(model, Patches(model))
    assert "LlamaRMSNorm" in fused_names(model)
    x, weight = (3 * torch.randn(rows, 32)).to(dtype), torch.randn(rows, 32).to(dtype)

    def gradient(norm: nn.Module, x: Tensor) -> Tensor:
        norm.weight.data.copy_(torch.linspace(-1, 2, 32))
        return torch.autograd.grad((norm(x) * weight.to(x.dtype)).sum(), norm.weight)[0]

    have, theirs = (gradient(each.model.norm, x) for each in (model, own))
    exactly = gradient(exact.model.norm, x.double())
    assert have.dtype == dtype
    allowed = float((theirs - exactly).abs().max())
    assert float((have - exactly).abs().max()) <= 4 * allowed + torch.finfo(dtype).eps * float(exactly.abs().max())


def test_the_number_of_threads_changes_no_bit_of_a_norms_gradients() -> None:
    model = tiny.llama().float()
    fuse(model, Patches(model))
    x, before, found = torch.randn(1000, 32), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(model.model.norm(leaf).pow(2).sum(), [leaf, model.model.norm.weight]))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_a_norm_leaves_other_numbers_than_its_own_to_the_module() -> None:
    model = tiny.llama().float()
    fuse(model, Patches(model))
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    assert torch.equal(model.model.norm(x), type(model.model.norm).forward(model.model.norm, x))


def test_attaching_to_another_path_releases() -> None:
    model = tiny.with_lora(tiny.llama().float())
    forest = Forest.of(random_batch(4))
    scorer = attach(model)
    assert scorer.name == "native"
    assert "LlamaRMSNorm" in fused_names(model)
    with torch.no_grad():
        ours = leaf_logprobs(scorer, forest).token_S
        scorer = attach(model, "dense")
        assert scorer.name == "dense"
        assert "LlamaRMSNorm" not in fused_names(model)
        stock = leaf_logprobs(scorer, forest).token_S
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
