"""The safetensors files of a model: read one tensor at a time, written one file at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from preftree.io.atomic import write_json

INDEX = "model.safetensors.index.json"


class BaseShards:
    """Tensors of a model folder by name.

    Args:
        folder: with model.safetensors, or with an index of several files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._file_of: dict[str, str] = dict(index["weight_map"])
        else:
            self._file_of = {name: file for file in files for name in self._content(file).keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def by_file(self) -> dict[str, list[str]]:
        """File -> names of its tensors, both in order."""
        found: dict[str, list[str]] = {}
        for name, file in sorted(self._file_of.items(), key=lambda item: (item[1], item[0])):
            found.setdefault(file, []).append(name)
        return found

    def get(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        return self._content(self._file_of[name]).get_tensor(name)  # type: ignore[no-any-return]

    def dtype(self) -> torch.dtype:
        """The precision of the first tensor of floating-point numbers."""
        return next(t.dtype for t in map(self.get, self._file_of) if t.is_floating_point())

    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / file).stat().st_size for file in set(self._file_of.values()))

    def _content(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, "pt")
        return self._open[file]


def write_shards(
    folder: Path,
    files: dict[str, list[str]],
    tensor: Callable[[str], Tensor],
    progress: Callable[[int, int], None],
) -> None:
    """Write tensors into files as `files` has them, one file in memory at a time, with an index of several files."""
    total, weight_map, size = len(files), {}, 0
    for number, (file, names) in enumerate(files.items(), start=1):
        content = {name: tensor(name).contiguous() for name in names}
        save_file(content, folder / file, {"format": "pt"})
        size += sum(each.numel() * each.element_size() for each in content.values())
        weight_map.update(dict.fromkeys(names, file))
        progress(number, total)
    if total > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
