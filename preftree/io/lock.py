"""One process at a time in an output folder, and no folder left by one that did nothing."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from preftree.errors import RunError


@contextmanager
def folder_lock(lock: Path, folder: Path) -> Iterator[None]:
    """Hold the file `lock` for the block as the sign that this process works in `folder`; a kill releases it.

    Raises RunError where another process holds it, or where the file cannot be made.
    """
    holder = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        holder.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"Another process is working in {folder}. Wait until it is done, or give another folder."
        ) from None
    except OSError as error:
        raise RunError(f"{folder} cannot be used ({error.strerror or error}). Give another folder.") from None
    try:
        yield
    finally:
        holder.release()


@contextmanager
def removed_if_unused(folder: Path, names: Collection[str]) -> Iterator[None]:
    """Delete `folder` after the block if it was made within it and holds nothing but files of these names.

    So that a mistake that is found under the lock leaves no empty output folder.

    Args:
        names: relative to the folder.
    """
    made = not folder.exists()
    try:
        yield
    finally:
        if made and folder.is_dir():
            files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
            if files <= set(names):
                shutil.rmtree(folder)
