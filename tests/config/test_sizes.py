"""Amounts of memory: bytes in either case of letters, never bits, and nothing that is no amount."""

from __future__ import annotations

import pytest

from preftree.config.sizes import size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("2gb", 2 * 10**9), ("1500MiB", 1500 * 2**20), ("0.5 g", 5 * 10**8), ("1e", None),
     ("4096", 4096), ("infGB", None), ("nanGB", None), ("-2GB", None), ("0GB", None), ("2Gbit", None), ("", None),
     ("9" * 30, None), ("２GB", None)],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="no amount"):
            size_in_bytes(text)
    else:
        assert size_in_bytes(text) == size
