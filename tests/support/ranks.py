"""Several ranks of the real command, as processes forked from a server that has imported everything once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch import Tensor

import preftree.train.run  # noqa: F401 (imported for the processes that are forked from the server)
from preftree.cli import main_train
from preftree.train.trainer import DPOTrainer
from tests.chaos import phases

ROOT = Path(__file__).parents[2]

gc.freeze()  # in the server: no process forked from it looks for garbage in what is imported, or copies it for that


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def as_torchrun(rank: int, count: int) -> dict[str, str]:
    """The variables of a rank, each on a host of its own."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }


def as_srun(rank: int, count: int) -> dict[str, str]:
    """The same by `srun --ntasks COUNT` on one host, which sets none of torch's variables."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "node7",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": str(count),
    }


def server() -> ForkServerContext:
    """Starts processes by forking one that has imported everything, once for all tests in this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    os.environ["PYTHONPATH"] = str(ROOT)  # where the server looks for this module
    return context


def start(
    argv: Sequence[str],
    count: int,
    folder: Path,
    *,
    launcher: Callable[[int, int], dict[str, str]] = as_torchrun,
    lose: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Start ranks as a launcher would; what they print goes to folder/rank0, rank1 …

    Args:
        launcher: the variables of a rank, from its number and the count.
        lose: variables of the last rank, which ends (LOSE_BY, a signal's name) before its step LOSE_AT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = server()
    common = {
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PREFTREE_CACHE": os.environ["PREFTREE_CACHE"],
    }
    processes: list[BaseProcess] = []
    for rank in range(count):
        variables = {**common, **launcher(rank, count), **((lose or {}) if rank == count - 1 else {})}
        process = context.Process(target=_rank, args=(list(argv), variables, folder / f"rank{rank}"), daemon=True)
        process.start()
        processes.append(process)
    return processes


def finish(processes: Sequence[BaseProcess], timeout: float = 300) -> list[int | None]:
    """Exit codes; None for a rank that did not end in time, which is ended then."""
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return codes


def said(folder: Path, count: int) -> list[str]:
    """What each rank printed."""
    return [(folder / f"rank{rank}").read_text() for rank in range(count)]


def together(
    argv: Sequence[str], count: int, folder: Path, launcher: Callable[[int, int], dict[str, str]] = as_torchrun
) -> str:
    """Run one command line on several ranks, all of which must succeed; returns what rank 0 printed."""
    codes = finish(start(argv, count, folder, launcher=launcher))
    printed = said(folder, count)
    assert codes == [0] * count, "\n".join(
        f"--- rank {rank}: {code}\n{text}" for rank, (code, text) in enumerate(zip(codes, printed, strict=True))
    )
    return printed[0]


def _rank(argv: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.update(environment)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # as in conftest: no rank dies by a power cut
    with open(output, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    import torch

    torch.set_num_threads(1)
    if "LOSE_AT" in environment:
        _end_before(int(environment["LOSE_AT"]), signal.Signals[environment["LOSE_BY"]])
    if "PHASE_FILE" in environment:
        aim = environment.get("KILL_IN", "").split(",")
        phases.watch(Path(environment["PHASE_FILE"]), (aim[0], int(aim[1]), float(aim[2])) if len(aim) == 3 else None)
    sys.exit(main_train(argv))


def _end_before(step: int, by: signal.Signals) -> None:
    whole = DPOTrainer.training_step

    def training_step(self: DPOTrainer, *args: Any, **others: Any) -> Tensor:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), by)
        return whole(self, *args, **others)

    DPOTrainer.training_step = training_step  # type: ignore[method-assign]
