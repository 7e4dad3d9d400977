"""Work that survives a kill: files that appear whole or not at all, and a journal that only grows.

A journal holds one JSON line for each finished unit of work, on disk before the unit counts as done. A kill can tear
the last line at most; it is dropped when the journal is opened again, and its unit is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from preftree.errors import RunError


class Journal:
    """Units of work by name, each with a JSON value. Use as a context manager; one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                name, value = json.loads(line)
            except ValueError:
                self._file.close()
                raise RunError(f"{self.path} line {number} is damaged. Delete the file to ask again for all.") from None
            self._values[name] = value
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(whole)
        _sync_folder(self.path.parent)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __len__(self) -> int:
        return len(self._values)

    def append(self, name: str, value: Any) -> None:
        """Record a unit; once this returns, no kill and no power cut loses it."""
        self._file.write(json.dumps([name, value]).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._values[name] = value


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place when the block ends well, and leaves no trace otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    try:
        with open(half, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
        _sync_folder(path.parent)
    finally:
        half.unlink(missing_ok=True)


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Hold a lock for the block; a kill releases it. Raises RunError where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"Another process is working in {path.parent.parent}. Wait until it is done, or give another folder."
            ) from None
        yield


def _sync_folder(folder: Path) -> None:
    """Make names in `folder` durable: fsync on a file does not cover the name it is found under."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
