"""The samples beside the tests and benchmarks: each is listed with origin and licence, and nothing lies outside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LICENCES = ("MIT", "Apache-2.0", "CC-BY-SA-4.0")
TEXTS = (".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".json")


@pytest.mark.parametrize("folder", ["tests/samples", "benchmarks/data"])
def test_every_file_is_listed_with_its_rows_origin_and_licence(folder: str) -> None:
    listed = {}
    for line in (ROOT / folder / "README.md").read_text("utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        files, rows, columns, origin, licence = (cell.strip() for cell in line.strip("|").split("|"))
        assert columns
        assert origin
        assert licence.startswith(LICENCES)
        first, *others = re.findall(r"`([^`]+)`", files)
        names = [first, *(re.sub(r"_[a-z]+\.jsonl$", f"{other}.jsonl", first) for other in others)]
        listed |= dict(zip(names, map(int, rows.split(", ")), strict=True))
    found = {
        str(path.relative_to(ROOT / folder)): path.read_bytes().count(b"\n")
        for path in (ROOT / folder).rglob("*.jsonl")
    }
    assert listed == found


def test_nothing_reads_from_outside_the_checkout() -> None:
    outside = re.compile(r"\.\./shared|shared/data|parents\[\d\]\.parent\b")
    folders = ("preftree", "tests", "benchmarks", "docs", "runs", "scripts", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in TEXTS]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in (*TEXTS, "")]
    assert len(files) > 200
    named = [str(path) for path in files if path != Path(__file__) and outside.search(path.read_text("utf-8"))]
    assert named == []
