"""Products by torch's other library: the same numbers, and none of it where it does not pay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from preftree.model.cpu import linear


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    if not linear.packs(torch.float32):
        pytest.skip("this torch has no oneDNN product for float32")
    monkeypatch.setattr(linear, "mkl_is_held_back", lambda: True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24)])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 40)
    found, expected = linear.frozen(layer, x), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad((out * weight).sum(), x)[0] for out in (found, expected)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("always")
def test_weights_may_be_a_transposed_view() -> None:
    x, weight = torch.randn(7, 40), torch.randn(40, 24)
    torch.testing.assert_close(linear.linear(x, weight.T), x @ weight, rtol=1e-5, atol=1e-5)


def needs_packing(dtype: torch.dtype) -> None:
    if not linear.packs(dtype):
        pytest.skip(f"this torch or this processor has no packed product in {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (0, 24)])
def test_packed_weights_give_the_same(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    needs_packing(dtype)
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    slope = torch.randn(*shape[:-1], 40, dtype=dtype)
    expected = layer(x)
    assert linear.pack(layer.weight)
    found = linear.frozen(layer, x)
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, x, slope)[0] for out in (found, expected)),
        **close,
    )
    assert linear.packed(layer.weight) is not None


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.data.mul_(2), lambda w: w.copy_(torch.ones(6, 8))])
def test_a_weight_that_was_written_to_is_packed_no_more(write: Callable[[Tensor], object]) -> None:
    needs_packing(torch.float32)
    layer, x = nn.Linear(8, 6).requires_grad_(False), torch.randn(3, 8)
    linear.pack(layer.weight)
    write(layer.weight)
    torch.testing.assert_close(linear.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-5, atol=1e-5)
    assert linear.packed(layer.weight) is None


@pytest.mark.parametrize(("dtype", "promised"), [(torch.bfloat16, 8 * 6 * 2), (torch.float32, 0)])
def test_what_a_backward_pass_will_take_is_promised_until_it_is_taken(dtype: torch.dtype, promised: int) -> None:
    needs_packing(dtype)
    layer = nn.Linear(8, 6).to(dtype).requires_grad_(False)
    assert linear.promised_bytes(layer) == 0
    linear.pack(layer.weight)
    assert linear.promised_bytes(layer) == promised
    linear.frozen(layer, torch.randn(3, 8, dtype=dtype, requires_grad=True)).sum().backward()
    assert linear.promised_bytes(layer) == 0
    pack = linear.packed(layer.weight)
    assert pack is not None
    assert (pack.backward is not None) == bool(promised)


def test_a_weight_put_in_place_of_another_is_not_taken_for_it() -> None:
    needs_packing(torch.float32)
    layer, x = nn.Linear(8, 6, bias=False).requires_grad_(False), torch.randn(3, 8)
    linear.pack(layer.weight)
    layer.weight.data = torch.randn(4, 8)
    assert linear.linear(x, layer.weight).shape == (3, 4)
    linear.pack(layer.weight)
    layer.double()
    assert linear.linear(x.double(), layer.weight).dtype == torch.float64


def test_what_cannot_be_packed_is_said() -> None:
    assert not linear.pack(torch.randn(4, 8, dtype=torch.float64))
    assert not linear.pack(torch.randn(8, 4).T)
    assert linear.packed(torch.randn(4, 8)) is None


def test_packs_go_with_their_weights() -> None:
    needs_packing(torch.float32)
    before, layer = len(linear._packs), nn.Linear(8, 6).requires_grad_(False)
    linear.pack(layer.weight)
    assert len(linear._packs) == before + 1
    del layer
    assert len(linear._packs) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "mkl_is_held_back", lambda: True)
    monkeypatch.setattr(linear, "_onednn", None)  # may not be called
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert torch.equal(linear.linear(x, weight), nn.functional.linear(x, weight))


def test_a_torch_without_the_operation_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operation")

    monkeypatch.setattr(linear, "_onednn", missing)
    monkeypatch.setattr(linear, "mkl_is_held_back", lambda: True)
    linear.packs.cache_clear()
    try:
        assert not linear.is_faster(torch.float32)
        assert not linear.packs(torch.bfloat16)
    finally:
        linear.packs.cache_clear()


def test_a_wrong_product_with_a_weight_as_it_lies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the gradients of input and weight are computed so."""
    needs_packing(torch.float32)
    right = linear._onednn

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return right(x, weight, bias) + float(weight.layout == torch.strided and not weight.is_contiguous())

    monkeypatch.setattr(linear, "_onednn", wrong)
    linear.packs.cache_clear()
    try:
        assert not linear.packs(torch.float32)
    finally:
        linear.packs.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "", False),
    ],
)
def test_the_processor_decides_and_no_clock(
    vendor: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks and resumed runs must compute alike, however busy the machine is."""
    monkeypatch.setattr(linear, "cpuinfo", lambda: {"vendor_id": vendor} if vendor else {})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    linear.mkl_is_held_back.cache_clear()
    try:
        assert linear.mkl_is_held_back() is (expected and torch.backends.mkl.is_available())
    finally:
        linear.mkl_is_held_back.cache_clear()
