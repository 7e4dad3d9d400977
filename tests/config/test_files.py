"""Settings files: whatever is in them ends in one sentence that repeats nothing of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from preftree.config.files import read_settings


def read(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    problems: list[str] = []
    return dict(read_settings(path, ("model", "lora"), problems)), problems


def test_groups_lists_and_empty_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "model:\n  dtype: float32\n  token: <redacted>\nlora: {lora_rank: 4}\nnone: null\nempty: []\nwords: [a, 1]\n"
        "yes: true\nkwargs: {a: 1}\n"
    )
    expected = {"dtype": ["float32"], "lora_rank": ["4"], "words": ["a", "1"], "True": ["true"], "kwargs": ['{"a": 1}']}
    assert read(path) == (expected, [])


@pytest.mark.parametrize(
    ("name", "content", "piece"),
    [
        ("a.yaml", "token: hf_secret\n  bad: [", "is not YAML: line 2, column 6"),
        ("a.yaml", "token: *hf_secret", "is not YAML: line 1"),
        ("a.yaml", "a: 'hf_secret", "is not YAML: line 1"),
        ("a.yaml", "token: hf_secret\n\ta: 1", "is not YAML: line 2"),
        ("a.json", '{"token": "hf_secret",}', "is not JSON: line 1, column 23"),
        ("a.yaml", "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        ("a.yaml", "- hf_secret", "must hold 'flag: value' lines. Got a list"),
        ("a.yaml", "a: " + "x" * (1 << 20), "too large"),
        ("a.yaml", b"\xff\xfe\xff", "it is not UTF-8 text"),
    ],
    ids=range(10),
)
def test_a_broken_file(tmp_path: Path, name: str, content: str | bytes, piece: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found, problems = read(path)
    assert found == {}
    assert len(problems) == 1
    assert piece in problems[0]
    assert "hf_secret" not in problems[0]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    assert "it is not a file" in read(tmp_path / "fifo.yaml")[1][0]
    assert "No such file" in read(tmp_path / "none.yaml")[1][0]
