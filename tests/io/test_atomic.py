"""A file or folder appears whole under its name, or not at all; a failure leaves nothing beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from preftree.io.atomic import atomic_file, atomic_files, atomic_path, write_json


class Torn(Exception):
    pass


def fail(_: object) -> None:
    raise Torn


def make_folder_of_one(folder: Path) -> None:
    folder.mkdir()
    (folder / "inner").touch()


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    for text in ("old", "new ü"):
        with atomic_file(target, "w") as file:
            file.write(text)
            file.flush()
            assert not target.exists() or target.read_text() == "old"
        assert target.read_text(encoding="utf-8") == text
    assert [path.name for path in target.parent.iterdir()] == ["b.txt"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(Torn), atomic_file(target) as file:
        fail(file.write(b"half"))
    with pytest.raises(Torn), atomic_path(tmp_path / "folder") as partial:
        fail(make_folder_of_one(partial))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert target.read_bytes() == b"old"


def test_content_and_name_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.split('.')[0]}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    with atomic_path(tmp_path / "target") as partial:
        partial.mkdir()
        (partial / "inner").write_text("x")
    assert calls == ["sync inner", "sync ", "rename", f"sync {tmp_path.name}"]


def test_files_and_names_of_a_folder_are_synced_and_nothing_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output folder holds checkpoints of many gigabytes."""
    make_folder_of_one(tmp_path / "checkpoint-5")
    calls: list[str] = []

    def recorded(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)
        calls.append("/".join("hidden" if part.endswith(".partial") else part for part in path.parts))

    monkeypatch.setattr(os, "fsync", recorded)
    with atomic_files(tmp_path) as partial:
        (partial / "a").write_text("x")
        (partial / "new" / "sub").mkdir(parents=True)
        (partial / "new" / "sub" / "b").write_text("x")
    assert sorted(calls[:5]) == ["hidden", "hidden/a", "hidden/new", "hidden/new/sub", "hidden/new/sub/b"]
    assert calls[5:] == ["new/sub", "new", ""]  # the names that files got


def test_a_folder_is_not_replaced_while_it_holds_something(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "first").touch()
    with pytest.raises(OSError, match="model"), atomic_path(tmp_path / "model") as partial:
        make_folder_of_one(partial)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "first"]


def _write(path: Path, letter: str) -> None:
    for _ in range(20):
        with atomic_file(path, "w") as file:
            for _ in range(50):
                file.write(letter * 100)


def test_two_writers_never_mix(tmp_path: Path) -> None:
    target = tmp_path / "shared"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(target, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    content = target.read_text()
    assert len(content) == 5000
    assert len(set(content)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_long_names_and_lone_surrogates(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250)
    write_json(target, {"name": "a\udcffb", "tokens": ["ü"]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"name": "a\udcffb", "tokens": ["ü"]}


def test_files_of_a_folder_are_replaced_each_in_one_piece(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(Torn), atomic_files(tmp_path) as partial:
        fail((partial / "a.bin").write_bytes(b"half"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "mine.txt"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    with atomic_files(tmp_path) as partial:
        (partial / "a.bin").write_bytes(b"new")
        make_folder_of_one(partial / "sub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "mine.txt", "sub"]
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert (tmp_path / "sub" / "inner").exists()
