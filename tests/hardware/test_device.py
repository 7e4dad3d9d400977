"""The device is chosen by rule and explained."""

from __future__ import annotations

import pytest
import torch

from preftree.config.train import parse_settings
from preftree.errors import DeviceError
from preftree.hardware import device
from preftree.hardware.device import Choice, choose_device, gemm_peak
from preftree.hardware.memory import available_memory, total_memory
from preftree.train.arguments import start_arguments

BASE = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]


def test_the_device_is_what_is_asked_for_or_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == Choice("cpu", "asked for by --use_cpu")
    monkeypatch.setattr(device, "find_accelerator", lambda: None)
    assert "was found" in choose_device().reason
    assert choose_device(found="cpu:0").value == "cpu"  # of a rank among several
    with pytest.raises(DeviceError, match="--device cuda: torch finds no accelerator here"):
        choose_device("cuda")
    monkeypatch.setattr(device, "find_accelerator", lambda: "hpu")
    assert choose_device().value == "hpu"
    assert choose_device("hpu", "hpu:1").value == "hpu:1"


def test_a_cpu_with_a_number_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate calls it among several ranks, and as --device may."""
    assert total_memory("cpu:0") == total_memory("cpu")
    assert measured("cpu", 0, monkeypatch) == measured("cpu:0", 0, monkeypatch) == {1536}


def measured(name: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The sizes of the products by which the peak is found, all of them as fast as one of 8 rows."""
    sizes: set[int] = set()
    drawn = torch.randn
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, **options: sizes.update(size) or drawn(8, 8))
        assert gemm_peak.__wrapped__(name, torch.float32, seconds) > 0
    return sizes


def test_a_large_product_is_for_fast_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """8192 rows take a slow one longer than all the time there is."""
    monkeypatch.setattr(device, "kind_of", lambda name: "hpu")
    assert measured("cpu", 0, monkeypatch) == {2048}
    assert measured("cpu", 0.05, monkeypatch) == {2048, 8192}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_taken_and_named() -> None:
    choice = choose_device()
    assert choice.value.startswith("cuda")
    assert torch.cuda.get_device_name() in choice.reason
    assert 0 < available_memory(choice.value) <= total_memory(choice.value)


def test_habana_without_its_stack_is_one_clear_error() -> None:
    with pytest.raises(DeviceError, match="habana_frameworks") as caught:
        start_arguments(parse_settings([*BASE, "--use_habana"]).train)
    assert "--use_habana" in str(caught.value)


def test_a_choice_prints_with_its_reason() -> None:
    assert str(Choice(torch.bfloat16, "fast")) == "bfloat16: fast"
