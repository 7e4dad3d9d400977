"""Which rank this process is, and of how many: torch's variables from those of other launchers.

torchrun and accelerate set RANK and WORLD_SIZE. mpirun and srun set variables that torch does not read, and every rank
would silently train alone. Standard library only: this runs before torch is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from preftree.errors import DeviceError


@dataclass(frozen=True)
class _Mpi:
    """The variables of one MPI launcher, and how to tell it where the rendezvous is."""

    rank: str
    local_rank: str
    size: str
    local_size: str
    advice: str


_MPI = (
    _Mpi(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "Start through gaudi_spawn.py --hostfile, or add '-x MASTER_ADDR=FIRST_HOST' to mpirun.",
    ),
    _Mpi(  # MPICH and Intel MPI
        "PMI_RANK",
        "MPI_LOCALRANKID",
        "PMI_SIZE",
        "MPI_LOCALNRANKS",
        "Add '-genv MASTER_ADDR FIRST_HOST' to mpirun.",
    ),
)


def ranks_for(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE MASTER_ADDR and MASTER_PORT, as far as they are not set yet.

    Empty for a process that was started alone or by a launcher that sets torch's variables. Those win, so that
    torchrun may itself be started by srun or mpirun, once per host.

    Raises:
        DeviceError: there are other ranks, and the environment does not say how to find them.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return {}
    # mpirun starts its helpers on other hosts by srun, whose variables its ranks inherit: so mpirun's come first.
    for mpi in _MPI:
        if mpi.local_rank in environ and _number(environ, mpi.size) > 1:
            return _of_mpi(mpi, environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        return _of_srun(environ)
    if _number(environ, "PMI_SIZE") > 1:
        raise DeviceError(
            f"An MPI launcher started {environ['PMI_SIZE']} ranks, but does not tell them their local ranks"
            " (MPI_LOCALRANKID). Start them by torchrun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and"
            " MASTER_PORT for each."
        )
    return {}


def _of_mpi(mpi: _Mpi, environ: Mapping[str, str]) -> dict[str, str]:
    size = environ[mpi.size]
    local_size = environ.get(mpi.local_size, size)
    found = {"RANK": environ[mpi.rank], "LOCAL_RANK": environ[mpi.local_rank], "WORLD_SIZE": size}
    if local_size != size and "MASTER_ADDR" not in environ:
        raise DeviceError(
            f"mpirun started ranks on several hosts, but MASTER_ADDR, the host of rank 0, is not set. {mpi.advice}"
        )
    return found | {"LOCAL_WORLD_SIZE": local_size} | _rendezvous("127.0.0.1", 29500, environ)


def _of_srun(environ: Mapping[str, str]) -> dict[str, str]:
    # SLURM_STEP_…, not SLURM_NTASKS: that one is also set in a batch script, which is one process alone.
    size = environ["SLURM_STEP_NUM_TASKS"]
    here = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", size))
    node = _number(environ, "SLURM_NODEID", 0)
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environ]
    if len(here) > 1 and "MASTER_ADDR" not in environ and not nodes:
        missing.append("SLURM_STEP_NODELIST")
    if node >= len(here):
        missing.append("SLURM_NODEID")
    if missing:
        raise DeviceError(
            f"srun started {size} ranks, but does not tell each its rank ({', '.join(missing)}). Start them by"
            " torchrun, as runs/slurm.sh does, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT for each."
        )
    found = {"RANK": environ["SLURM_PROCID"], "LOCAL_RANK": environ["SLURM_LOCALID"], "WORLD_SIZE": size}
    # The node that called srun may be a login node: rank 0 is on the first of the step's own.
    address = "127.0.0.1" if len(here) == 1 else first_host(nodes)
    # Jobs and steps that share a host use different ports.
    port = 20000 + (_number(environ, "SLURM_JOB_ID", 0) + _number(environ, "SLURM_STEP_ID", 0)) % 10000
    return found | {"LOCAL_WORLD_SIZE": str(here[node])} | _rendezvous(address, port, environ)


def _rendezvous(address: str, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    defaults = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return {name: value for name, value in defaults.items() if name not in environ}


def first_host(nodes: str) -> str:
    """The first name of a list such as `gpu[07-09,12],login1`, which is Slurm's way to write it."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _tasks_per_node(text: str) -> list[int]:
    """Tasks on each node; `4(x2),3` is 4, 4, 3."""
    found: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(tasks)] * int(times or 1)
    return found


def advice(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A note for a process that is alone where Slurm has allocated several tasks."""
    tasks = _number(environ, "SLURM_NTASKS")
    if "RANK" in environ or tasks < 2 or "SLURM_STEP_NUM_TASKS" in environ:
        return []
    return [f"This Slurm job has {tasks} tasks, and this process trains alone; srun starts one process per task."]


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for the run; also before `ranks_for` was applied."""
    try:
        return {**environ, **ranks_for(environ)}.get("RANK", "0") == "0"
    except DeviceError:
        return True


def check_world_size(actual: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise DeviceError when the process group is smaller or larger than what the launcher started."""
    names = ("WORLD_SIZE", *(mpi.size for mpi in _MPI), "SLURM_STEP_NUM_TASKS")
    launched = next((environ[name] for name in names if environ.get(name)), None)
    if launched is not None and int(launched) != actual:
        raise DeviceError(
            f"The launcher started {launched} ranks, but the process group has {actual}: each group would"
            " train a model of its own. Start dpo_clm.py or `preftree train`, which tell torch its rank."
        )


def _number(environ: Mapping[str, str], name: str, otherwise: int = 1) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdigit() else otherwise
