"""JSON values, and files that grow by one JSON line per record.

A record counts once its newline is on the disk. A kill or a full disk can tear the last line only: it is left out
by `read_jsonl` and removed by the next `append_jsonl`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from preftree.errors import DataError

_BLOCK = 1 << 16


def read_jsonl(path: str | os.PathLike[str], *, skip_damaged: bool = False) -> Iterator[Any]:
    """The records of a file written by `append_jsonl`; none where there is no file.

    Args:
        skip_damaged: leave out lines that are not JSON instead of raising.
    Raises:
        DataError: a line is not JSON, and it is not a torn last line.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                if skip_damaged:
                    continue
                raise DataError(f"{path} line {number} is damaged: it is not JSON.") from None
            yield record


def append_jsonl(path: str | os.PathLike[str], record: Any, *, durable: bool = False) -> None:
    """Append one record; where that fails, the file is left as it was.

    Args:
        durable: return only once the record is on the disk, so that not even a power cut loses it.
    """
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        end = _drop_torn_line(file.fileno())
        try:
            rest = memoryview(line)
            while rest:  # a full disk takes a part, and says why only when it is asked again
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file, or something else in it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def json_line(record: Any) -> str:
    """A record as one line of text; a lone surrogate, which UTF-8 cannot write, becomes an escape."""
    return json.dumps(to_json(record), ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def to_json(value: Any) -> Any:
    """JSON values only: scalars of torch and numpy as numbers, NaN and infinities as the words for them."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no NaN; float("nan") reads the word
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):
        return to_json(value.item())
    return str(value)


def _drop_torn_line(descriptor: int) -> int:
    """Cut a last line without its newline, or the next record would be joined to it; returns the file's size."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - (1 if end == size else _BLOCK))
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return end
