"""Limits of the system on this process's memory: found, respected while work is done, and explained."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import preftree.model.memory  # noqa: F401 (torch's words for it are known once torch is imported)
from preftree.cli import guarded
from preftree.errors import SettingsError
from preftree.hardware import limits
from preftree.hardware.limits import Limit, allocations_within, control_groups, importing, process_limits


def group(folder: Path, version: int, **files: str) -> None:
    """A control group's files, with 500 bytes used, 200 of them file cache."""
    names = {1: ("memory.usage_in_bytes", "total_inactive_file"), 2: ("memory.current", "inactive_file")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text("500\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[1]} 200\n")
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(content)


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    group(tmp_path / "a" / "b", 2, max="max\n", high="700\n")
    group(tmp_path / "a", 2, max="1000\n", high="max\n")
    (tmp_path / "me").write_text("0::/a/b\n")
    found = control_groups(tmp_path, tmp_path / "me")
    assert found == [
        Limit("memory.high of the control group", 700, 300, shared=True),
        Limit("memory.max of the control group", 1000, 300, shared=True),
    ]
    assert control_groups(tmp_path, tmp_path / "nowhere") == []


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    """Beside an empty line of version 2, as systems with both have it; a number of 19 digits is no limit."""
    group(tmp_path / "memory" / "a", 1, limit_in_bytes="2000\n")
    group(tmp_path / "memory", 1, limit_in_bytes="9223372036854771712\n")
    (tmp_path / "me").write_text("4:cpu:/a\n5:memory:/a\n0::/\n")
    found = control_groups(tmp_path, tmp_path / "me")
    assert found == [Limit("memory.limit_in_bytes of the control group", 2000, 300, shared=True)]
    assert found[0].free == 1700


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """The path of /proc/self/cgroup is the host's and is not there."""
    group(tmp_path, 2, max="1000\n")
    (tmp_path / "me").write_text("0::/docker/0123\n")
    assert [limit.size for limit in control_groups(tmp_path, tmp_path / "me")] == [1000]


@pytest.mark.parametrize(("name", "which"), [("ulimit -v", resource.RLIMIT_AS), ("ulimit -d", resource.RLIMIT_DATA)])
def test_ulimits_are_found(name: str, which: int) -> None:
    soft, hard = resource.getrlimit(which)
    assert name not in [limit.name for limit in process_limits()]
    resource.setrlimit(which, (2**45, hard))
    try:
        (found,) = [limit for limit in process_limits() if limit.name == name]
    finally:
        resource.setrlimit(which, (soft, hard))
    assert found.size == 2**45
    assert 2**20 < found.used < 2**44


def test_too_little_for_torch_itself_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "process_limits", lambda: [Limit("ulimit -v", 2**30, 0)])
    with (
        pytest.raises(SettingsError, match=r"ulimit -v allows this process 1\.00 GiB, .* give --max_memory"),
        importing(),
    ):
        raise AssertionError("nothing is imported")
    monkeypatch.setattr(limits, "process_limits", lambda: [Limit("ulimit -v", 2**33, 0)])
    with pytest.raises(SettingsError, match="more with a CUDA build"), importing():
        raise ImportError("libtorch_cuda.so: failed to map segment from shared object")
    with pytest.raises(ModuleNotFoundError), importing():
        raise ModuleNotFoundError("torch")


@pytest.mark.parametrize(
    "problem",
    [MemoryError("Cannot allocate memory (os error 12)"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["python", "torch"],
)
def test_running_out_anywhere_is_one_sentence(
    problem: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage() -> int:
        raise problem

    monkeypatch.setattr(limits, "memory_limits", lambda: [Limit("ulimit -v", 2**31, 2**31 - 2**20)])
    assert guarded(stage) == 2
    error = capsys.readouterr().err
    assert "ulimit -v allows 2.00 GiB, of which 0.00 GiB is left: raise it" in error
    assert "allocate memory" in error
    monkeypatch.setattr(limits, "memory_limits", list)
    assert guarded(stage) == 2
    assert "free memory on this machine" in capsys.readouterr().err


def test_the_command_under_a_small_ulimit(repo_root: Path, tmp_path: Path) -> None:
    """The real command, before anything slow."""
    flags = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", str(tmp_path / "O")]
    words = ["bash", "-c", 'ulimit -v 1500000; exec "$@"', "bash", sys.executable, "-m", "preftree", "train", *flags]
    done = subprocess.run(words, capture_output=True, text=True, cwd=repo_root, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ulimit -v allows this process 1.43 GiB")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "O").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of writable memory")
def test_allocations_beyond_a_limit_fail_and_only_within_the_block() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with allocations_within(resident + 2**27):
        assert len(bytearray(2**25)) == 2**25
        with pytest.raises(MemoryError):
            bytearray(2**29)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(2**29)) == 2**29
    with allocations_within(None):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
