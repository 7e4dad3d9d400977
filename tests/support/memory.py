"""What the real command takes of memory beyond what its process had before, in a process forked for it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from preftree.hardware.memory import peak_memory
from preftree.train import run
from preftree.train.estimate import Estimate
from tests.support.ranks import ROOT


def growth(argv: Sequence[str], log: Path) -> int:
    """Bytes that `preftree train` takes at most; with `--dry_run true` those that it predicts.

    Args:
        log: file for what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.ranks"])
    os.environ["PYTHONPATH"] = str(ROOT)  # where the server looks for it
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(list(argv), dict(os.environ), log, sender), daemon=True)
    process.start()
    sender.close()
    try:
        code, found = receiver.recv()
    except EOFError:
        code, found = None, 0
    process.join()
    assert code == 0, log.read_text()
    return int(found)


def _run(argv: list[str], environment: dict[str, str], log: Path, sender: Connection) -> None:
    os.environ.update(environment)
    with open(log, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    import torch

    from preftree.cli import main_train

    torch.set_num_threads(1)
    predicted: list[Estimate] = []
    measure = run.measure
    run.measure = lambda *args: predicted.append(measure(*args)) or predicted[-1]  # type: ignore[func-returns-value]
    before = psutil.Process().memory_info().rss
    code = main_train(argv)
    found = (predicted[0].memory if predicted else peak_memory()) - before
    print(f"MEMORY {'predicted' if predicted else 'taken'} {found / 2**20:.0f} MiB")
    sender.send((code, found))
