"""A file that grows by lines: a torn last line is left out and removed, a failed write is taken back."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from preftree.errors import DataError
from preftree.io.jsonl import append_jsonl, read_jsonl, to_json


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    records = [{"a": 1}, ["key", [-math.inf, True]], {"text": "ü \u2028 \n \udcff"}]
    assert list(read_jsonl(path)) == []
    for record in records:
        append_jsonl(path, record, durable=True)
    assert list(read_jsonl(path)) == records
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("whole", [b"", b'{"step": 1}\n'], ids=["first line", "second line"])
@pytest.mark.parametrize("torn", [b"[", b'{"step": 2, "text": "' + b"x" * 200_000], ids=["short", "long"])
def test_a_torn_last_line_is_left_out_and_removed(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole + torn)
    before = list(read_jsonl(path))
    assert before == ([{"step": 1}] if whole else [])
    append_jsonl(path, {"step": 2})
    assert list(read_jsonl(path)) == [*before, {"step": 2}]


def test_a_damaged_line_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"[1]\n[2\n\xff\n[3]\n")
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is damaged"):
        list(read_jsonl(path))
    assert list(read_jsonl(path, skip_damaged=True)) == [[1], [3]]


def test_a_full_disk_leaves_the_records_before(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_jsonl(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_jsonl(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_scalars_of_libraries_become_numbers() -> None:
    value = {"loss": torch.tensor(0.5), 3: (np.float32(2), np.int64(7)), "nan": math.nan, "set": {None}}
    plain = to_json(value)
    assert plain == {"loss": 0.5, "3": [2.0, 7], "nan": "nan", "set": [None]}
    assert json.dumps(plain, allow_nan=False)
