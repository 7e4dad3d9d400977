"""Tables in a local file or folder."""

from __future__ import annotations

import re
from pathlib import Path

from preftree.data.files import READERS
from preftree.data.scan import Table
from preftree.errors import DataError, did_you_mean

_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")


def local_tables(path: Path, split: str) -> tuple[list[Table], list[str]]:
    """The file itself or the files of a folder that belong to the split; and those of other splits."""
    if path.is_dir():
        return _folder_tables(path, split)
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path} cannot be read: its ending is none of {', '.join(READERS)}. Convert it to one of them."
        )
    if _SPLITS.get(split, split) != "train":
        raise DataError(
            f"{path} is one file and has only the split train, not {split!r}. "
            f"Give a folder with files named after their split, or ask for train."
        )
    return [Table(str(path), path.name, READERS[path.suffix.lower()](path))], []


def _folder_tables(folder: Path, split: str) -> tuple[list[Table], list[str]]:
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder) for path in inside}
    files = [
        path
        for path in inside
        if path.suffix.lower() in READERS and not any(part.startswith(".") for part in names[path].parts)
    ]
    if not files:
        raise DataError(f"The folder {folder} holds no file that ends in {', '.join(READERS)}. Put the data there.")
    wanted = _SPLITS.get(split, split)
    taken = [path for path in files if _split_of(names[path]) == wanted]
    if not taken:
        there = ", ".join(sorted({_split_of(names[path]) for path in files}))
        raise DataError(f"The folder {folder} holds no file of the split {split!r}. It has: {there}.")
    tables = [Table(str(path), names[path].as_posix(), READERS[path.suffix.lower()](path)) for path in taken]
    return tables, [str(path) for path in files if path not in taken]


def _split_of(name: Path) -> str:
    words = re.findall(r"[a-z]+", " ".join((*name.parts[:-1], name.stem)).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")


def nothing_there(path: Path) -> str:
    """What to say of a path that does not exist."""
    said = f"There is no file or folder {path}."
    parent = path.parent
    if not parent.is_dir():
        return f"{said} Its folder {parent} does not exist either. Check the path."
    names = [entry.name for entry in parent.iterdir()]
    return f"{said}{did_you_mean(path.name, names)} Check the path; it is relative to {Path.cwd()}."
