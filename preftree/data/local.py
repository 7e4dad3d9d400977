"""Tables in a local file or folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from preftree.data.files import READERS, Numbered, without_nulls
from preftree.data.messages import RowProblem
from preftree.data.scan import Table
from preftree.errors import DataError, did_you_mean

_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")


# What the hub and `datasets` write about data beside it.
_ABOUT_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json"}
# Files that hold data and are not read: what to do about each.
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_UNREAD = {
    **dict.fromkeys((*_COMPRESSED, ".zip"), "it is compressed: unpack it."),
    **dict.fromkeys((".tsv", ".ndjson", ".feather", ".pkl", ".xlsx"), f"convert it to one of {', '.join(READERS)}."),
    ".arrow": "it is a part of a data set saved by `datasets`, without the dataset_info.json and state.json beside it.",
}
_LFS = b"version https://git-lfs.github.com/spec/"


def local_tables(path: Path, split: str) -> tuple[list[Table], list[str]]:
    """The file itself or the files of a folder that belong to the split; and those of other splits."""
    if path.is_dir():
        return _folder_tables(path, split)
    if not path.is_file():
        raise DataError(f"{path} is a pipe or a device and not a file, and data is read more than once: save it first.")
    if path.suffix.lower() == ".arrow":
        raise DataError(f"{path} is a part of a data set saved by `datasets`: name the folder that it lies in.")
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path} cannot be read: its ending is none of {', '.join(READERS)}. Convert it to one of them."
        )
    if _SPLITS.get(split, split) != "train":
        raise DataError(
            f"{path} is one file and has only the split train, not {split!r}. "
            f"Give a folder with files named after their split, or ask for train."
        )
    return [Table(str(path), path.name, _rows(path))], []


def _rows(path: Path) -> Iterable[Numbered]:
    """The rows of a file, or of a folder that `datasets` saved; or why it cannot be read, as its only row."""
    ending = path.suffix.lower()
    if path.is_dir():
        return saved_rows(path)
    if ending in _UNREAD:
        return [(0, RowProblem(f"it is not read: {_UNREAD[ending]}"))]
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return [
                (0, RowProblem("it is a pointer of Git LFS and not the data itself: fetch it with `git lfs pull`."))
            ]
    return READERS[ending](path)


def _folder_tables(folder: Path, split: str) -> tuple[list[Table], list[str]]:
    places = _places(folder)
    if not places:
        raise DataError(f"The folder {folder} holds no file that ends in {', '.join(READERS)}. Put the data there.")
    wanted = _SPLITS.get(split, split)
    taken = {path: name for path, name in places.items() if _split_of(name) == wanted}
    if not taken:
        there = ", ".join(sorted({_split_of(name) for name in places.values()}))
        raise DataError(f"The folder {folder} holds no file of the split {split!r}. It has: {there}.")
    tables = [Table(str(path), name.as_posix(), _rows(path)) for path, name in taken.items()]
    return tables, [str(path) for path in places if path not in taken]


def _places(folder: Path) -> dict[Path, Path]:
    """The files of data, and the folders that `Dataset.save_to_disk` wrote, each with its name within the folder."""
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    saved = [
        path.parent for path in inside if path.name == "state.json" and (path.parent / "dataset_info.json").is_file()
    ]
    names = {path: Path(path.relative_to(folder).as_posix()) for path in (*saved, *inside)}
    names |= {path: Path(folder.name) for path in saved if path == folder}
    return {
        path: name
        for path, name in names.items()
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (path in saved or _holds_data(path))
        and not any(path != root and path.is_relative_to(root) for root in saved)
    }


def _holds_data(path: Path) -> bool:
    """By its name, whether it can be read or not; a compressed file by the name of what is in it."""
    ending, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    if ending in _COMPRESSED:
        ending = inner
    return ending in (*READERS, *_UNREAD) and path.name not in _ABOUT_DATA


def saved_rows(folder: Path) -> Iterator[Numbered]:
    """The rows of a data set that `datasets` saved to a folder."""
    import datasets  # here, because it takes seconds and files do not need it

    try:
        rows = datasets.load_from_disk(str(folder))
        for number, row in enumerate(rows, start=1):
            yield number, without_nulls(row)
    except Exception as error:  # the library's own, Arrow's and the system's, all of them about this folder
        said = " ".join(str(error).split()) or type(error).__name__
        yield 0, RowProblem(f"it cannot be read as a data set that `datasets` saved ({said[:300]}). Is it whole?")


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
