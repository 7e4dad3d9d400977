"""Content hashes of what stages read and write: of files and folders by their bytes, of hub names by the name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from preftree.io.atomic import write_json
from preftree.io.jsonl import read_object

_BLOCK = 1 << 22


class Digests:
    """Hashes files, each once per size and time of change.

    Args:
        store: a JSON file in which hashes are kept between runs.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.known = read_object(store)

    def of(self, name: str) -> str:
        """The hash of a file, or of all files of a folder with their names; for anything else "named NAME"."""
        path = Path(name).expanduser()
        if path.is_file():
            return self._file(path)
        if not path.is_dir():
            return f"named {name}"
        files = sorted(each for each in path.rglob("*") if each.is_file() and not _hidden(each.relative_to(path)))
        return self.of_files(files, path)

    def of_files(self, files: Iterable[Path], root: Path) -> str:
        """The hash of some files with their names below `root`."""
        digest = xxhash.xxh3_128()
        for each in files:
            digest.update(f"{each.relative_to(root)} {self._file(each)}\n".encode())
        return digest.hexdigest()[:16]

    def _file(self, path: Path) -> str:
        status, key = path.stat(), str(path.resolve())
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self.known.get(key)
        if known is None or known[0] != stamp:
            digest = xxhash.xxh3_128()
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            known = self.known[key] = [stamp, digest.hexdigest()[:16]]
        return str(known[1])

    def save(self) -> None:
        """Keep what is known."""
        write_json(self.store, self.known)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
