"""A rank as Open MPI's mpirun starts it, and what torch is to read of that."""

from __future__ import annotations

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
RANKS = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
