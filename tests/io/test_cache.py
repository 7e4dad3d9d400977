"""The cache folder is counted and cleared, and nothing else in it is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.io.cache import cache_parts, cache_root, clear_cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))


def test_nothing_there() -> None:
    assert cache_parts() == []
    assert clear_cache() == []


def test_info_and_clear() -> None:
    for place in ("reference/a/1", "reference/a/2", "reference/b/3", "models/m/4", "mine/keep/5"):
        file = cache_root() / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 10)
    held = clear_cache()
    assert [(part.name, part.entries, part.files, part.size) for part in held] == [
        ("models", 1, 1, 10),
        ("reference", 2, 3, 30),
    ]
    assert [part.name for part in cache_parts()] == ["mine"]
    assert (cache_root() / "mine" / "keep" / "5").exists()


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PREFTREE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "preftree"
