"""Which rank a process is, by the variables of each launcher. No torch, no processes."""

from __future__ import annotations

import pytest

from preftree.distributed.launcher import advice, check_world_size, first_host, is_first_rank, ranks_for
from preftree.errors import DeviceError
from tests.support.launchers import HERE, OPEN_MPI, RANKS

MPICH = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "8"}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",  # maybe a login node
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2,3(x2)",
}
TORCHRUN = RANKS | {"MASTER_ADDR": "gpu07", "MASTER_PORT": "1"}
ALONE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (ALONE, ALONE),
        (TORCHRUN, ALONE),
        (OPEN_MPI, RANKS | HERE),
        (OPEN_MPI | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, RANKS),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
         RANKS | {"LOCAL_WORLD_SIZE": "4"}),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ALONE),
        (MPICH, RANKS | HERE),
        (SRUN, RANKS | {"LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24569"}),
        (SRUN | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, RANKS | {"LOCAL_WORLD_SIZE": "3"}),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"},
         RANKS | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "24569"}),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "8"},  # srun --mpi=pmi2
         RANKS | {"LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24569"}),
        # Launchers inside others: the inner one knows.
        (SRUN | TORCHRUN, ALONE),
        (OPEN_MPI | TORCHRUN, ALONE),
        (SRUN | MPICH, RANKS | HERE),
        # What an allocation says to processes that srun did not start, or started once.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ALONE),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ALONE),
    ],
)  # fmt: skip
def test_torchs_variables(environ: dict[str, str], expected: dict[str, str]) -> None:
    assert ranks_for(environ) == expected


@pytest.mark.parametrize(
    ("environ", "piece"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "-x MASTER_ADDR=FIRST_HOST"),
        (MPICH | {"MPI_LOCALNRANKS": "4"}, "-genv MASTER_ADDR FIRST_HOST"),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, "MPI_LOCALRANKID"),
        ({name: SRUN[name] for name in SRUN if name != "SLURM_LOCALID"}, r"\(SLURM_LOCALID\)"),
        ({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_NODELIST"}, r"\(SLURM_STEP_NODELIST\)"),
        (SRUN | {"SLURM_NODEID": "3"}, r"\(SLURM_NODEID\)"),
    ],
)
def test_ranks_that_cannot_find_each_other_say_so(environ: dict[str, str], piece: str) -> None:
    with pytest.raises(DeviceError, match=piece):
        ranks_for(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5-6]", "gpu3"),
        ("rack[0-1]node[2-3].x", "rack0node2.x"),
        ("a-b.c,d[1-2]", "a-b.c"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_world_of_the_wrong_size_is_refused() -> None:
    check_world_size(1, {})
    for environ in (OPEN_MPI, MPICH, SRUN, TORCHRUN):
        check_world_size(8, environ)
        with pytest.raises(DeviceError, match="started 8 ranks, but the process group has 1"):
            check_world_size(1, environ)
    check_world_size(8, TORCHRUN | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2"})


def test_a_batch_script_is_told_of_srun() -> None:
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert "has 8 tasks" in advice(batch)[0]
    for environ in (ALONE, SRUN, TORCHRUN, batch | TORCHRUN, batch | {"SLURM_NTASKS": "1"}):
        assert advice(environ) == []


def test_one_rank_speaks_for_all() -> None:
    assert is_first_rank(ALONE)
    assert not is_first_rank({"RANK": "1", "WORLD_SIZE": "2"})
    assert not is_first_rank(OPEN_MPI)  # before torch's variables are set
    assert is_first_rank(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"})
    assert is_first_rank({"PMI_RANK": "3", "PMI_SIZE": "8"})  # not known, so nothing is held back
