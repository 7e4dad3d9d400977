"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def size_in_bytes(text: str) -> int:
    """The bytes of '2GB', '1500MiB', '0.5 gb' or '4g'; units are bytes in either case of letters, never bits.

    Raises ValueError where `text` is no such amount above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?\s*", text, re.IGNORECASE | re.ASCII)
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if not 0 < size < 2**60:
        raise ValueError(f"{text!r} is no amount of memory")
    return size
