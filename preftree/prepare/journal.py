"""Work that survives a kill: one JSON line per finished unit of work, on disk before the unit counts as done.

A kill can tear the last line at most. Then it does not count, and its unit is done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preftree.errors import DataError, RunError
from preftree.io.jsonl import append_jsonl, read_jsonl


class Journal:
    """Units of work by name, each with a JSON value; for one process at a time.

    Raises RunError where the file is not what `append` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        try:
            for entry in read_jsonl(path):
                if not isinstance(entry, list) or len(entry) != 2:
                    raise DataError("an entry is not a name and a value")
                self._values[str(entry[0])] = entry[1]
        except DataError as error:
            raise RunError(f"{path} is damaged ({error}). Delete the file to ask again for all answers.") from None

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __len__(self) -> int:
        return len(self._values)

    def append(self, name: str, value: Any) -> None:
        """Record a unit; once this returns, no kill and no power cut loses it."""
        append_jsonl(self.path, [name, value], durable=True)
        self._values[name] = value
