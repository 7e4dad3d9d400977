"""One process at a time in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
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
