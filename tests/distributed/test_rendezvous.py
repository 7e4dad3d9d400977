"""Ranks that wait for each other, as threads of one process: how long, and what is said when some do not come."""

from __future__ import annotations

import signal
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest
import torch.distributed as dist

from preftree.distributed.rendezvous import rendezvous
from preftree.errors import DeviceError
from tests.support.ranks import as_torchrun, free_port


def of(rank: int, count: int, port: int, **more: str) -> dict[str, str]:
    return {**as_torchrun(rank, count), "MASTER_PORT": str(port), **more}


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": ""}])
def test_alone(environ: Mapping[str, str]) -> None:
    assert rendezvous(1, environ) is None


def test_all_come() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as threads:
        waits = [threads.submit(rendezvous, 30, of(rank, 3, port)) for rank in (2, 1, 0)]
        assert all(wait.result() is not None for wait in waits)


def test_under_torchrun() -> None:
    """Its agent holds the store, rank 0 is a guest like the others; ranks of an earlier attempt do not count."""
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    under = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    for attempt in "01":
        with pytest.raises(DeviceError, match="rank 1 did not come"):
            rendezvous(0.1, of(0, 2, port, TORCHELASTIC_RESTART_COUNT=attempt, **under))
    del agent


@pytest.mark.parametrize(
    ("rank", "count", "who"),
    [(1, 2, r"rank 0 did not come to 127.0.0.1:\d+ within 0.2 s \(Connection refused\)"),
     (0, 2, r"rank 1 did not come"),
     (0, 12, r"ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not come")],
)  # fmt: skip
def test_who_is_missing(rank: int, count: int, who: str) -> None:
    with pytest.raises(DeviceError, match=who) as caught:
        rendezvous(0.2, of(rank, count, free_port()))
    assert "--ddp_timeout" in str(caught.value)


def test_a_host_that_nobody_knows() -> None:
    with pytest.raises(DeviceError, match=r"rank 0 did not come to no\.such\.host\.invalid:1 "):
        rendezvous(0.2, of(1, 2, 1, MASTER_ADDR="no.such.host.invalid"))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(DeviceError, match="set another MASTER_PORT"):
            rendezvous(1, of(0, 2, other.getsockname()[1]))


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_where_to_meet_is_not_said(name: str) -> None:
    environ = of(1, 2, 1)
    del environ[name]
    with pytest.raises(DeviceError, match=f"not set: {name}"):
        rendezvous(1, environ)


def test_ctrl_c_ends_the_wait() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            rendezvous(60, of(1, 2, free_port()))
    finally:
        signal.signal(signal.SIGALRM, before)
