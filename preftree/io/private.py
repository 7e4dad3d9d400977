"""Folders that belong to this user alone, checked as ssh checks those of its keys.

What is loaded as code must not be replaceable by anybody else: the folder and all above it belong to this user or to
root, and neither group nor others may write there. A folder above may be open to all where its sticky bit keeps each
user's entries (as /tmp is); the folder itself may not.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> None:
    """Make `folder` and what is missing above it, for this user alone. Raises OSError where that cannot be."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def why_not_private(path: Path) -> str | None:
    """Who could replace what is at `path` (a file or folder), in words; None where nobody could."""
    own = os.geteuid()
    place = path.resolve()
    for position, part in enumerate((place, *place.parents)):
        status = part.lstat()
        if status.st_uid not in (own, 0):
            return f"{part} belongs to user {status.st_uid}"
        open_to_others = status.st_mode & _OTHERS_WRITE
        if open_to_others and not (position and status.st_mode & stat.S_ISVTX):
            return f"others may write to {part} (mode {stat.S_IMODE(status.st_mode):o})"
    return None
