"""Writing lm-eval's results and samples so that a folder holds all of them or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from preftree.errors import RunError
from preftree.hardware.environment import environment
from preftree.io.atomic import sync
from preftree.io.run_folder import RunFolder

#: How the names of folders begin in which files are written; a kill leaves them behind.
_UNFINISHED = ".writing-"


def remove_unfinished(out: str) -> None:
    """Remove what a killed evaluation left of its results; `out` is locked."""
    for place in Path(out).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(place, ignore_errors=True)


def save_results(out: str, tracker: EvaluationTracker, results: dict[str, Any]) -> None:
    """lm-eval's own files, written aside and checked; samples appear first, so whoever finds results finds them all.

    lm-eval logs a failed write and continues, so what it wrote is read back.

    Raises:
        RunError: they could not be written; nothing of them is left, and the answers are in the cache.
    """
    samples = results.pop("samples")
    counts = {task: len(rows) for task, rows in samples.items()}
    try:
        RunFolder(out).write_env(environment())
        # The tracker names samples by the time of its results, so these are written to a place of their own first.
        with tempfile.TemporaryDirectory(dir=out, prefix=_UNFINISHED) as place:
            tracker.output_path = place
            tracker.save_results_aggregated(results=results, samples=samples)
            for task, rows in samples.items():
                tracker.save_results_samples(task_name=task, samples=rows)
            written = _complete(Path(place), counts)
            sync(Path(place))
            _move(written, Path(place), Path(out))
    except OSError as problem:
        raise RunError(
            f"--out {out}: the results could not be written ({problem.strerror or problem}). Make room or give another "
            "folder, and run the same command again: finished answers are taken from the cache."
        ) from problem


def _complete(place: Path, counts: dict[str, int]) -> list[Path]:
    """The files in the order in which they may appear.

    Raises:
        OSError: one of them is missing or torn.
    """
    found = sorted(place.rglob("results_*.json"))
    if len(found) != 1 or not _is_json(found[0]):
        raise OSError("lm-eval wrote no whole results file; is the disk full?")
    stamp = found[0].stem.removeprefix("results_")
    files = []
    for task, count in counts.items():
        file = found[0].with_name(f"samples_{task}_{stamp}.jsonl")
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        whole = sum(line.endswith(b"\n") for line in lines)
        if whole != count:
            raise OSError(f"lm-eval wrote {whole} of {count} samples of {task}; is the disk full?")
        files.append(file)
    return [*files, found[0]]


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def _move(files: list[Path], place: Path, out: Path) -> None:
    """Rename each file to where it belongs; where one of them cannot be, take the others back."""
    moved: list[Path] = []
    try:
        for file in files:
            target = out / file.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
            moved.append(target)
    except OSError:
        for target in moved:
            target.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        raise
