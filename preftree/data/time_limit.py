"""A chat template is a program: it may loop. Rendering is therefore limited in time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from preftree.errors import ModelError

#: Seconds for a batch of conversations; a batch takes well under one.
SECONDS = 60.0


class TemplateTimeout(ModelError):
    """The chat template did not come to an end."""

    def __init__(self) -> None:
        super().__init__(
            f"The tokenizer's chat template did not finish within {SECONDS:g} seconds: it seems to loop. "
            f"Use a tokenizer with a working chat template."
        )


@contextmanager
def time_limit(seconds: float | None = None) -> Iterator[None]:
    """Raise TemplateTimeout in this thread where the block takes longer than `seconds` (`SECONDS`).

    Raised asynchronously, as there is no other way to stop a loop in Python code on any thread and system.
    """
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TemplateTimeout))

    timer = threading.Timer(SECONDS if seconds is None else seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
