"""Results appear whole or not at all, and only one evaluation writes into a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import evaluation_tracker

from preftree.errors import RunError
from preftree.evaluate import save
from preftree.evaluate.results import find_results, results_files
from preftree.io.lock import folder_lock


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["results", "samples", "sync", "rename"])
def test_a_full_disk_leaves_nothing_that_blocks_the_folder(
    at: str, evaluated: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval swallows what it cannot write; the same command works once there is room."""
    with monkeypatch.context() as disk:
        if at == "results":  # torn: half of it on the disk, and no error
            write = Path.write_text

            def torn(path: Path, content: str, **options: Any) -> int:
                end = len(content) // 2 if path.name.startswith("results_") else len(content)
                return write(path, content[:end], **options)

            disk.setattr(Path, "write_text", torn)
        elif at == "samples":
            disk.setattr(evaluation_tracker, "sanitize_list", full)
        elif at == "sync":
            disk.setattr(save, "sync", full)
        else:
            renamed = iter([True, False])
            replace = os.replace
            disk.setattr(save.os, "replace", lambda a, b: replace(a, b) if next(renamed) else full())
        with pytest.raises(RunError, match=r"the results could not be written .*run the same command again"):
            evaluated("out")
    assert results_files(tmp_path / "out") == []
    assert not list((tmp_path / "out").rglob("samples_*"))
    assert find_results(str(evaluated("out"))).scores.keys() == {"truthfulqa_mc2"}


def test_two_evaluations_in_one_folder(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock(out / ".lock", out), pytest.raises(RunError, match="Another process is working in"):
        evaluated("out")
    assert find_results(str(evaluated("out")))


def test_what_a_killed_evaluation_left_is_removed(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    left = tmp_path / "out" / ".writing-abc" / "model"
    left.mkdir(parents=True)
    (left / "results_1.json").write_text("{")
    assert find_results(str(evaluated("out")))
    assert not left.exists()
