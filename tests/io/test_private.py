"""What others could replace is never loaded."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from preftree.io.cache import cache_folder
from preftree.io.private import make_private, why_not_private


def test_what_is_made_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
        monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))
        folders = [tmp_path / "a", tmp_path / "a" / "b", cache_folder("tokens"), tmp_path / "cache"]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert all(why_not_private(folder) is None for folder in folders)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_write_to(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    (shared / "mine").mkdir(mode=0o700)
    assert why_not_private(shared) == f"others may write to {shared} (mode {mode:o})"
    sticky = mode & stat.S_ISVTX  # there they cannot replace what is mine
    assert (why_not_private(shared / "mine") is None) == bool(sticky)


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    owner = tmp_path.stat().st_uid
    status = Path.lstat

    def of_another(path: Path) -> os.stat_result:
        found = list(status(path))
        found[stat.ST_UID] = owner + 1 if path == tmp_path else found[stat.ST_UID]
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", of_another)
    assert why_not_private(tmp_path / "link") == f"{tmp_path} belongs to user {owner + 1}"
