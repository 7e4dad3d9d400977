"""Device and precision are chosen by rule and explained; what is kept about the machine names nobody."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preftree.config.train import Settings, TrainSettings, parse_settings
from preftree.errors import DeviceError
from preftree.hardware import device
from preftree.hardware.device import (
    Choice,
    available_memory,
    choose_device,
    choose_dtype,
    gemm_peak,
    inference_dtype,
    peak_memory,
    total_memory,
)

BASE = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]


def settings(*flags: str) -> Settings:
    return parse_settings([*BASE, *flags])


@pytest.mark.parametrize(
    ("flags", "instructions", "speedup", "dtype", "piece"),
    [
        ([], "amx_bf16", 2.0, torch.bfloat16, "auto: this CPU has amx_bf16"),
        ([], None, 0.02, torch.float32, "has no bfloat16 instructions; measured"),
        (["--bf16"], "avx512_bf16", 2.0, torch.bfloat16, "--bf16: this CPU has avx512_bf16"),
        (["--bf16"], None, 0.02, torch.float32, "takes 50 x the time"),
        (["--bf16"], "avx512_bf16", 0.1, torch.float32, "is slow with it"),
        (["--bf16", "--torch_dtype", "bfloat16"], None, 0.02, torch.bfloat16, "asked for by --torch_dtype"),
        (["--bf16", "--dtype", "float32"], "amx_bf16", 2.0, torch.float32, "asked for by --torch_dtype"),
        (["--fp16"], "amx_bf16", 2.0, torch.float32, "--fp16 is for GPUs"),
    ],
)
def test_dtype_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    instructions: str | None,
    speedup: float,
    dtype: torch.dtype,
    piece: str,
) -> None:
    monkeypatch.setattr(device, "cpu_bf16_instructions", lambda: instructions)
    monkeypatch.setattr(device, "bf16_speedup", lambda: speedup)
    choice = choose_dtype(settings("--use_cpu", *flags), "cpu")
    assert choice.value == dtype
    assert piece in choice.reason


@pytest.mark.parametrize(
    ("flags", "where", "dtype"),
    [
        ([], "cuda:0", torch.bfloat16),
        (["--fp16"], "cuda:0", torch.float16),
        (["--bf16"], "hpu:0", torch.bfloat16),
        ([], "hpu:0", torch.bfloat16),
        ([], "mps", torch.float32),
        (["--torch_dtype", "float16"], "mps", torch.float16),
    ],
)
def test_dtype_elsewhere(monkeypatch: pytest.MonkeyPatch, flags: list[str], where: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype(settings("--use_cpu", *flags), where).value == dtype


def test_an_old_gpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype(settings("--use_cpu"), "cuda:0").value == torch.float32


def test_the_device_is_the_one_training_arguments_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device(settings("--use_cpu")) == Choice("cpu", "asked for by --use_cpu")
    monkeypatch.setattr("preftree.config.train._accelerator_available", lambda: False)
    assert "was found" in choose_device(settings()).reason
    monkeypatch.setattr(TrainSettings, "device", torch.device("cpu:0"))  # of a rank among several
    assert choose_device(settings("--use_cpu")).value == "cpu"


def test_a_cpu_with_a_number_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate calls it among several ranks, and as --device may."""
    monkeypatch.setattr(device, "cpu_bf16_instructions", lambda: None)
    monkeypatch.setattr(device, "bf16_speedup", lambda: 0.02)
    assert inference_dtype("cpu:0") == inference_dtype("cpu")
    assert choose_dtype(settings("--use_cpu"), "cpu:0") == choose_dtype(settings("--use_cpu"), "cpu")
    assert total_memory("cpu:0") == total_memory("cpu")
    sizes: list[int] = []
    drawn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: sizes.append(size[0]) or drawn(8, 8))  # type: ignore[func-returns-value]
    for name in ("cpu", "cpu:0"):
        gemm_peak(name, torch.float32, seconds=0)
    assert len(set(sizes)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_taken_and_named() -> None:
    choice = choose_device(settings("--bf16"))
    assert choice.value.startswith("cuda")
    assert torch.cuda.get_device_name() in choice.reason
    assert 0 < available_memory(choice.value) <= total_memory(choice.value)


def test_habana_without_its_stack_is_one_clear_error() -> None:
    with pytest.raises(DeviceError, match="habana_frameworks") as caught:
        choose_device(settings("--use_habana"))
    assert "--use_habana" in str(caught.value)


def test_a_choice_prints_with_its_reason() -> None:
    assert str(Choice(torch.bfloat16, "fast")) == "bfloat16: fast"


def test_the_speed_of_bfloat16_is_measured() -> None:
    device.bf16_speedup.cache_clear()
    assert 0 < device.bf16_speedup() < 1000


def test_bf16_instructions_are_read_from_the_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, found in (("fpu avx512_bf16 sse", "avx512_bf16"), ("fpu sse", None), ("amx_bf16", "amx_bf16")):
        monkeypatch.setattr(device, "_cpuinfo", lambda flags=flags: {"flags": flags})
        device.cpu_bf16_instructions.cache_clear()
        assert device.cpu_bf16_instructions() == found
    device.cpu_bf16_instructions.cache_clear()


def test_environment_names_the_machine_and_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = device.environment()
    text = json.dumps(found)
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["memory_gib"] > 0
    assert "hf_secret" not in text
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text


def test_memory_is_consistent() -> None:
    assert 0 < available_memory() <= total_memory()
    assert 10 * 2**20 < peak_memory() <= total_memory()


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    def group(folder: Path, limit: str, names: tuple[str, str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(limit)
        (folder / names[1]).write_text("500\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 200\n")

    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(tmp_path / "v2" / "a" / "b", "max\n", second)
    group(tmp_path / "v2" / "a", "1000\n", second)
    group(tmp_path / "v1" / "memory" / "a", "2000\n", first)
    (tmp_path / "me2").write_text("0::/a/b\n")
    (tmp_path / "me1").write_text("4:cpu:/a\n5:memory:/a\n")
    assert device._cgroup_memory(tmp_path / "v2", tmp_path / "me2") == [(1000, 300)]
    assert device._cgroup_memory(tmp_path / "v1", tmp_path / "me1") == [(2000, 300)]
    assert device._cgroup_memory(tmp_path, tmp_path / "nowhere") == []


def test_a_control_group_lowers_total_and_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cgroup_memory", lambda: [(1000, 300), (900, 850)])
    assert total_memory() == 900
    assert available_memory() == 50


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    """In a process of its own: the setting is the whole process's."""
    code = "from preftree.hardware.device import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(platform.libc_ver()[0] == "glibc")]
