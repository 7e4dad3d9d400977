"""The real command on a small file system of its own that fills up, becomes read-only or loses the output folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from preftree.cli import main_train
from preftree.io.cache import cache_root
from preftree.train.checkpoint import checkpoints, newest
from tests.support.command import history
from tests.support.reruns import assert_same_run, at_step, flags

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


class Disk:
    """A mounted tmpfs of 4 MiB."""

    def __init__(self, path: Path) -> None:
        self.path, self.filler = path, path / "filler"

    def fill(self) -> None:
        """Leave not one byte."""
        with suppress(OSError), open(self.filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        self.filler.unlink()

    def make_read_only(self) -> None:
        """By a second mount in front of it: the first one has a file open for writing, the lock."""
        for words in (["--bind", str(self.path)], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *words, str(self.path)], check=True)

    def make_writable(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can be mounted by root only ({mounted.stderr.strip()})")
    try:
        yield Disk(place)
    finally:
        while place.is_mount():
            subprocess.run(["umount", str(place)], check=True)


def test_full_while_saving_and_logging(
    inputs: Path, whole: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint is lost, training is not; with room again the run ends as the undisturbed one."""
    output = disk.path / "O"
    found: list[int] = []

    def room() -> None:
        found.extend(one.step for one in checkpoints(output))
        assert newest(output, lambda text: None) is not None
        disk.free()

    at_step(monkeypatch, 3, disk.fill)
    at_step(monkeypatch, 6, room)
    assert main_train(flags(inputs, output)) == 0
    assert "checkpoint-4 could not be written" in capsys.readouterr().out
    assert found == [2]  # nothing of checkpoint-4 is left, and what was there is whole
    assert_same_run(output, whole)


def test_full_until_the_end(
    inputs: Path, whole: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The final adapter cannot be written: one message; with room again the same command goes on."""
    output = disk.path / "O"
    with monkeypatch.context() as patch:
        at_step(patch, 3, disk.fill)
        assert main_train(flags(inputs, output)) == 2
    error = capsys.readouterr().err
    assert "could not be written" in error
    assert "Make room and give the same command again" in error
    disk.free()
    assert main_train(flags(inputs, output)) == 0
    assert "checkpoint-2" in capsys.readouterr().out
    assert_same_run(output, whole)


def test_full_from_the_start(inputs: Path, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.fill()
    assert main_train(flags(inputs, disk.path / "O")) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "No space left on device" in error
    assert "Traceback" not in error


def test_read_only_in_the_middle(
    inputs: Path, whole: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = disk.path / "O"
    with monkeypatch.context() as patch:
        at_step(patch, 3, disk.make_read_only)
        code = main_train(flags(inputs, output))
    said = capsys.readouterr()
    assert code == 2
    assert "checkpoint-4 could not be written" in said.out
    assert said.out.count("metrics.jsonl cannot be written") == 1
    assert "Read-only file system" in said.err
    disk.make_writable()
    assert main_train(flags(inputs, output)) == 0
    assert_same_run(output, whole)


def test_a_cache_without_room_costs_the_cache(
    inputs: Path,
    whole: Path,
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main_train(flags(inputs, tmp_path / "without", reference_cache="false")) == 0
    (disk.path / "kernels").symlink_to(cache_root() / "kernels")
    monkeypatch.setenv("PREFTREE_CACHE", str(disk.path))
    disk.fill()
    assert main_train(flags(inputs, tmp_path / "O")) == 0
    assert "reference log-probs cannot be kept" in capsys.readouterr().out
    assert_same_run(tmp_path / "O", tmp_path / "without")


@pytest.mark.parametrize(
    "how", [shutil.rmtree, lambda path: path.rename(path.with_name("moved"))], ids=["deleted", "moved"]
)
def test_an_output_folder_that_vanishes(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], object]
) -> None:
    """It is made again, and holds the whole result in the end."""
    output = tmp_path / "O"
    at_step(monkeypatch, 3, lambda: how(output))
    assert main_train(flags(inputs, output)) == 0
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert [one.step for one in checkpoints(output)] == [6, 4]
    assert [record["step"] for record in history(output)] == [record["step"] for record in history(whole)]


def test_a_file_in_the_place_of_the_output_folder(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "O"

    def replaced() -> None:
        shutil.rmtree(output)
        output.write_text("mine")

    at_step(monkeypatch, 3, replaced)
    assert main_train(flags(inputs, output)) == 2
    said = capsys.readouterr()
    assert "checkpoint-4 could not be written" in said.out
    assert "The final adapter could not be written" in said.err
    assert output.read_text() == "mine"
