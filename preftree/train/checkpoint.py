"""Checkpoints that are whole or not there: written aside, synced, sealed by hashes, renamed.

    OUTPUT_DIR/checkpoint-N/manifest.json    the step, and size and hash of every other file

A folder without a manifest, or with a file that differs from it, is never resumed from: `newest` says what is wrong
with it and takes the one before.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from preftree.io.atomic import atomic_path, write_json

MANIFEST = "manifest.json"
#: Format of the manifest; a checkpoint of another one is not read.
VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK = 1 << 20


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A folder `checkpoint-N`, sealed or not."""

    step: int
    path: Path

    def faults(self) -> list[str]:
        """What is wrong with it, one sentence per file; empty if it is exactly what was saved."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            files = {
                _inner(name): (int(each["bytes"]), str(each["xxh3_128"])) for name, each in manifest["files"].items()
            }
        except FileNotFoundError:
            return [f"it has no {MANIFEST}, so it was not written to its end or not by preftree"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{MANIFEST} is damaged"]
        if not files:
            return [f"{MANIFEST} lists no file"]
        if manifest.get("version") != VERSION:
            return [f"{MANIFEST} has version {manifest.get('version')!r}; this preftree reads {VERSION}"]
        return [fault for name, known in files.items() if (fault := _fault(self.path / name, name, *known))]


def _inner(name: str) -> str:
    """The name of a file in the folder; raises ValueError for one outside it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(name)
    return name


def _fault(path: Path, name: str, size: int, digest: str) -> str | None:
    try:
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        return None if _hash(path) == digest else f"{name} is damaged: its content has changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as problem:
        return f"{name} cannot be read: {problem.strerror}"


def seal(folder: Path, step: int) -> None:
    """Write the manifest of a folder that holds everything else already."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"version": VERSION, "step": step, "files": files})


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def sealed_folder(output_dir: Path, step: int) -> Iterator[Path]:
    """A folder to fill that becomes `checkpoint-STEP` when the block ends without an exception.

    A checkpoint of the same step that is there already is replaced.
    """
    target = output_dir / f"checkpoint-{step}"
    with atomic_path(target) as partial:
        partial.mkdir()
        yield partial
        seal(partial, step)
        if target.exists():  # a rename cannot replace a folder that holds something
            _discard(target)


def _discard(path: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that a kill in between leaves no half of it under that name."""
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The checkpoint folders of an output folder, newest step first, whatever state they are in."""
    if not output_dir.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir())
    return sorted((Checkpoint(int(match[1]), path) for match, path in found if match), reverse=True)


def newest(output_dir: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is exactly what was saved; each newer one is reported with its fault."""
    for checkpoint in checkpoints(output_dir):
        faults = checkpoint.faults()
        if not faults:
            return checkpoint
        say(f"skipped    {checkpoint.path.name}: {'; '.join(faults[:3])}")
    return None


def prune(output_dir: Path, limit: int | None, keep: Path | None = None) -> None:
    """Delete the oldest checkpoints until `limit` are left; never `keep`, and never the newest whole one.

    Args:
        limit: as `--save_total_limit`; None or 0 keeps all.
        keep: the best checkpoint so far, which counts towards the limit.
    """
    remove_leftovers(output_dir)
    if not limit:
        return
    present = checkpoints(output_dir)
    whole = [checkpoint for checkpoint in present if (checkpoint.path / MANIFEST).is_file()]
    protected = {checkpoint.path for checkpoint in whole[:1]}
    if keep is not None:
        protected.add(keep)
    ordered = sorted(present, key=lambda checkpoint: checkpoint.path not in protected)  # stable: then newest first
    for checkpoint in ordered[max(limit, len(protected)) :]:
        _discard(checkpoint.path)


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed process left of checkpoints that it was writing or deleting."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.deleted"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
