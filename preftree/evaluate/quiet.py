"""What lm-eval and datasets print by themselves, replaced by one labelled line per stage."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import datasets
from lm_eval import evaluator
from lm_eval.api import task as lm_eval_task


@contextmanager
def without_warnings(*names: str) -> Iterator[None]:
    """The loggers of `names` report errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet_libraries(progress: Callable[[int, int | None], None]) -> Iterator[None]:
    """lm-eval's warnings, one nameless bar for every task (57 for MMLU), git's complaints: none of it is for the user.

    Args:
        progress: called with (contexts built, None) in place of the bars.
    """
    with ExitStack() as stack:
        stack.enter_context(without_warnings("lm_eval"))
        if not datasets.utils.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        # lm-eval has no switch for these two.
        stack.enter_context(_replaced(lm_eval_task, "tqdm", _Counted(progress)))
        stack.enter_context(_replaced(evaluator, "get_git_commit_hash", _git_commit))
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class _Counted:
    """Takes the place of `tqdm` where contexts are built."""

    def __init__(self, progress: Callable[[int, int | None], None]) -> None:
        self._progress, self._done = progress, 0

    def __call__(self, items: Iterable[Any], **_: Any) -> Iterator[Any]:
        for item in items:
            yield item
            self._done += 1
            self._progress(self._done, None)


def _git_commit() -> str | None:
    """The commit of the folder that evaluation runs in, as lm-eval records it; None outside a repository."""
    try:
        command = ["git", "describe", "--always"]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None
