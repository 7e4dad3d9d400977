"""Checkpoints: whole or not there, whenever the process dies, and the last good one is never deleted."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from preftree.train.checkpoint import MANIFEST, Checkpoint, checkpoints, newest, prune, sealed_folder

FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt")
CHUNKS = 8


def content(step: int, name: str) -> bytes:
    return f"{step} {name} ".encode() * 50


def write_checkpoint(folder: Path, step: int, point: Callable[[], None] = lambda: None) -> None:
    """A checkpoint of several files, each written in pieces; `point` is called between them."""
    with sealed_folder(folder, step) as partial:
        for name in FILES:
            whole = content(step, name)
            size = len(whole) // CHUNKS + 1
            with open(partial / name, "wb", buffering=0) as file:
                for start in range(0, len(whole), size):
                    file.write(whole[start : start + size])
                    point()


def silent(text: str) -> None:
    pass


def is_whole(checkpoint: Checkpoint) -> bool:
    return all((checkpoint.path / name).read_bytes() == content(checkpoint.step, name) for name in FILES)


# --- kills ---------------------------------------------------------------------------------------


def killed_at(moment: int, work: Callable[[Callable[[], None]], None]) -> bool:
    """Run `work` in a process that dies at its `moment`-th write, open, rename, removal or sync; False if it ended.

    Death is `_exit`: no block is left in order, as after SIGKILL.
    """
    child = os.fork()
    if child == 0:
        done = 0

        def point() -> None:
            nonlocal done
            done += 1
            if done == moment:
                os._exit(9)

        watched = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
        sys.addaudithook(lambda event, arguments: point() if event in watched else None)
        os.fsync = lambda descriptor: point()
        try:
            work(point)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def one_earlier(folder: Path) -> None:
    """Nothing beside checkpoint-5."""


def damaged(folder: Path) -> None:
    """What a trainer without manifests leaves when it is killed: checkpoint-10 with a cut file."""
    write_checkpoint(folder, 10)
    (folder / "checkpoint-10" / MANIFEST).unlink()
    os.truncate(folder / "checkpoint-10" / "optimizer.pt", 7)


def a_whole_one(folder: Path) -> None:
    write_checkpoint(folder, 10)


def an_older_one(folder: Path) -> None:
    write_checkpoint(folder, 4)


def killed_at_every_moment(place: Path, before: Callable[[Path], None], limit: int | None) -> int:
    """How many moments there were; at each the newest checkpoint was a whole one, and the next save went through."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]

    def work(folder: Path, point: Callable[[], None]) -> None:
        write_checkpoint(folder, 10, point)
        prune(folder, limit)

    moment = 0
    died = True
    while died:
        moment += 1
        folder = place / str(moment)
        write_checkpoint(folder, 5)
        before(folder)
        died = killed_at(moment, lambda point, folder=folder: work(folder, point))  # type: ignore[misc]
        found = newest(folder, silent)
        assert found is not None, moment
        assert found.step in (5, 10), moment
        assert is_whole(found), moment
        work(folder, lambda: None)  # and the next process saves as if nothing had happened
        assert (after := newest(folder, silent)) is not None, moment
        assert after.step == 10, moment
        assert not list(folder.glob(".*")), moment
    return moment


@pytest.fixture(scope="module")
def small_process() -> Iterator[ProcessPoolExecutor]:
    """Without torch, so that forking it hundreds of times takes milliseconds each."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("before", "limit"), [(one_earlier, None), (damaged, None), (a_whole_one, None), (an_older_one, 1)]
)
def test_a_kill_at_any_moment_of_a_save(
    small_process: ProcessPoolExecutor, tmp_path: Path, before: Callable[[Path], None], limit: int | None
) -> None:
    moments = small_process.submit(killed_at_every_moment, tmp_path, before, limit).result()
    assert moments > 60  # so the four cases together have more than 240


# --- damage --------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "changed", "missing"])
def test_a_damaged_checkpoint_is_reported_and_skipped(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (5, 10):
        write_checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoint-10" / name)
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 5
    assert len(said) == 1
    assert "checkpoint-10" in said[0]
    assert name in said[0]


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        '{"version": 1, "files": {}}',
        '{"version": 1, "files": {"optimizer.pt": "x"}}',
        '{"version": 1, "files": {"optimizer.pt": {"bytes": "many"}}}',
        '{"version": 1, "files": {"../../secret": {"bytes": 1, "xxh3_128": "a"}}}',
        '{"version": 1, "files": ["optimizer.pt"]}',
    ],
)
def test_a_manifest_of_another_form_is_damaged(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, 5)
    write_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-10" / MANIFEST).write_text(content)
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 5
    assert said[0].startswith(f"skipped    checkpoint-10: {MANIFEST} ")


def test_folders_of_others_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert checkpoints(tmp_path) == []
    assert newest(tmp_path / "nothing", silent) is None


# --- limits --------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_outlives_any_limit(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-8" / MANIFEST).unlink()
    prune(tmp_path, 1)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [6]


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, 2, keep=tmp_path / "checkpoint-2")
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [8, 2]
    prune(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 2
