"""Products by torch's other library: the same numbers, and none of it where it does not pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from preftree.model import linear


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    if linear.faster() == 0.0:
        pytest.skip("this torch has no oneDNN product for float32")
    monkeypatch.setattr(linear, "faster", lambda: 2.0)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "faster", lambda: 2.0)
    monkeypatch.setattr(linear, "_onednn", None)  # may not be called
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert torch.equal(linear.linear(x, weight), nn.functional.linear(x, weight))


def test_a_torch_without_the_operation_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operation")

    monkeypatch.setattr(linear, "_onednn", missing)
    linear.faster.cache_clear()
    try:
        assert linear.faster() == 0.0
        assert not linear.pays(torch.float32)
    finally:
        linear.faster.cache_clear()
