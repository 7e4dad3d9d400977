"""The one way to write a file or folder: it appears whole under its name, or not at all.

What is written goes to a hidden name beside the target, is synced to the disk, and is renamed at the end; then the
folder that holds the name is synced too, since syncing a file does not cover its name. A kill or a power cut at any
moment leaves the previous content or the new one. No two processes get the same hidden name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from preftree.io.jsonl import to_json

#: Ending of the hidden names; files with it are leftovers of a killed process.
SUFFIX = ".partial"


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file to write that takes the place of `path` when the block ends without an exception.

    Args:
        path: where the file is to be; its folder is made.
        mode: "wb" or "w"; text is UTF-8.
        options: passed to `open` (`newline`, `errors`).
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    with atomic_path(path) as partial, open(partial, mode, **options) as file:
        yield file


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write a file or folder under that becomes `path` when the block ends without an exception.

    For libraries that take a path. A folder cannot replace one that holds something: `OSError`, and the folder that
    is there stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}{SUFFIX}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
        _sync_one(target.parent)
    finally:
        _remove(partial)


@contextmanager
def atomic_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder to fill, whose files replace those in `folder` when the block ends without an exception.

    Each file is whole at every moment; files in `folder` of other names stay.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".{uuid.uuid4().hex}{SUFFIX}"
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        renamed = {target}
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                place = target / path.relative_to(partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
                renamed.update(folder for folder in place.parents if folder.is_relative_to(target))
        for folder in sorted(renamed, reverse=True):  # not what else is in `target`, checkpoints for instance
            _sync_one(folder)
    finally:
        _remove(partial)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Replace `path` by `content` as indented JSON, converted by `to_json`."""
    # What UTF-8 cannot write (a lone surrogate, as in the name of a file) becomes an escape that JSON reads back.
    with atomic_file(path, "w", errors="backslashreplace") as file:
        json.dump(to_json(content), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def sync(path: Path) -> None:
    """Make a file, or a folder with all that it holds, durable."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            sync(inner)
    if not path.is_symlink():
        _sync_one(path)


def _sync_one(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a file or folder that may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
