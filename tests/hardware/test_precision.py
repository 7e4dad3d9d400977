"""Precision is chosen by one rule for all commands, and explained."""

from __future__ import annotations

import pytest
import torch

from preftree.config.prepare import parse_settings
from preftree.hardware import precision
from preftree.hardware.device import Choice
from preftree.hardware.precision import choose_dtype
from preftree.prepare.engines import local


@pytest.mark.parametrize(
    ("asked", "flags", "instructions", "speedup", "dtype", "piece"),
    [
        ("auto", {}, "amx_bf16", 2.0, torch.bfloat16, "auto: this CPU has amx_bf16"),
        ("auto", {}, None, 0.02, torch.float32, "has no bfloat16 instructions; measured"),
        ("auto", {"bf16": True}, "avx512_bf16", 2.0, torch.bfloat16, "--bf16: this CPU has avx512_bf16"),
        ("auto", {"bf16": True}, None, 0.02, torch.float32, "takes 50 x the time"),
        ("auto", {"bf16": True}, "avx512_bf16", 0.1, torch.float32, "is slow with it"),
        ("bfloat16", {"bf16": True}, None, 0.02, torch.bfloat16, "asked for by --dtype"),
        ("float32", {"bf16": True}, "amx_bf16", 2.0, torch.float32, "asked for by --dtype"),
        ("auto", {"fp16": True}, "amx_bf16", 2.0, torch.float32, "--fp16 is for GPUs"),
    ],
)
def test_dtype_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    flags: dict[str, bool],
    instructions: str | None,
    speedup: float,
    dtype: torch.dtype,
    piece: str,
) -> None:
    monkeypatch.setattr(precision, "cpu_bf16_instructions", lambda: instructions)
    monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)
    choice = choose_dtype("cpu", asked, **flags)
    assert choice.value == dtype
    assert piece in choice.reason


@pytest.mark.parametrize(
    ("asked", "flags", "where", "dtype"),
    [
        ("auto", {}, "cuda:0", torch.bfloat16),
        ("auto", {"fp16": True}, "cuda:0", torch.float16),
        ("auto", {"bf16": True}, "hpu:0", torch.bfloat16),
        ("auto", {}, "hpu:0", torch.bfloat16),
        ("auto", {}, "mps", torch.float32),
        ("float16", {}, "mps", torch.float16),
    ],
)
def test_dtype_elsewhere(
    monkeypatch: pytest.MonkeyPatch, asked: str, flags: dict[str, bool], where: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype(where, asked, **flags).value == dtype


def test_an_old_gpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("cuda:0").value == torch.float32


def test_a_cpu_with_a_number_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate calls it among several ranks, and as --device may."""
    monkeypatch.setattr(precision, "cpu_bf16_instructions", lambda: None)
    monkeypatch.setattr(precision, "bf16_speedup", lambda: 0.02)
    assert choose_dtype("cpu:0") == choose_dtype("cpu")


def test_the_speed_of_bfloat16_is_measured() -> None:
    precision.bf16_speedup.cache_clear()
    assert 0 < precision.bf16_speedup() < 1000


def test_a_busy_machine_does_not_look_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this thread's CPU time counts, and the number of threads comes back."""
    monkeypatch.setattr(precision.time, "perf_counter", lambda: pytest.fail("wall-clock time includes other processes"))
    threads = torch.get_num_threads()
    assert precision._product_seconds(96, torch.float32) > 0
    assert torch.get_num_threads() == threads


def test_bf16_instructions_are_read_from_the_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, found in (("fpu avx512_bf16 sse", "avx512_bf16"), ("fpu sse", None), ("amx_bf16", "amx_bf16")):
        monkeypatch.setattr(precision, "cpuinfo", lambda flags=flags: {"flags": flags})
        precision.cpu_bf16_instructions.cache_clear()
        assert precision.cpu_bf16_instructions() == found
    precision.cpu_bf16_instructions.cache_clear()


def test_prepare_has_no_policy_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):
        pass

    def load(place: object, dtype: torch.dtype, **options: object) -> None:
        raise Loaded(dtype)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(local, "choose_device", lambda asked: Choice("cuda:0", "a test"))
    monkeypatch.setattr(local, "load_model", load)
    flags = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]
    with pytest.raises(Loaded, match="float32"):
        local.make(parse_settings(flags))
