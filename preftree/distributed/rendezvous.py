"""The rendezvous of all ranks: with a timeout, and with the names of those that are missing when it is over.

torch waits as well, but for 30 minutes where accelerate does not pass --ddp_timeout on (on the CPU), without a word,
deaf to Ctrl-C, and at the end without saying which rank is missing.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from preftree.errors import DeviceError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_QUIET = 10.0  # seconds before the first message: launchers start ranks one after the other


def rendezvous(timeout: float, environ: Mapping[str, str] = os.environ) -> TCPStore | None:
    """Wait until as many processes as $WORLD_SIZE says are at $MASTER_ADDR and $MASTER_PORT.

    Returns the store that rank 0 must keep until its process group has started, since the others look for it there.
    None for a process that is alone.

    Raises:
        DeviceError: some did not come within `timeout` seconds, or it is not known where rank 0 is.
    """
    count, rank = int(environ.get("WORLD_SIZE") or 1), int(environ.get("RANK") or 0)
    if count < 2 or not dist.is_available() or dist.is_initialized():
        return None
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
        raise DeviceError(
            f"WORLD_SIZE={count} says that there are other ranks, but not set: {', '.join(missing)}. Start the ranks "
            "by torchrun, or set for each its number and the host and a free port of rank 0."
        )
    return _Rendezvous(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), rank, count, timeout, environ).held()


class _Rendezvous:
    def __init__(self, host: str, port: int, rank: int, count: int, timeout: float, environ: Mapping[str, str]) -> None:
        self.host, self.port, self.rank, self.count, self.timeout = host, port, rank, count, timeout
        self.started = time.monotonic()
        # torchrun's agents have had their rendezvous and keep the store open themselves, the same one after a restart.
        self.hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.name = f"preftree/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def held(self) -> TCPStore:
        from torch.distributed import TCPStore  # type: ignore[attr-defined] # not in every build

        here = self.rank == 0 and not self.hosted
        if not here:
            self._until_listening()
        try:
            # Several stores of one process may share the port, so torch's own process group finds it free.
            store = TCPStore(
                self.host,
                self.port,
                is_master=here,
                timeout=timedelta(seconds=self.timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
            store.set(f"{self.name}/{self.rank}", "")
            self._until_all(store)
        except RuntimeError as error:
            raise self._gone(error, here) from error
        return store

    def _until_listening(self) -> None:
        # By a plain socket first: torch's own attempts to connect cannot be interrupted.
        problem = "no answer"
        for left in self._ticks(f"rank 0 at {self.host}:{self.port}"):
            try:
                socket.create_connection((self.host, self.port), timeout=max(left, 0.1)).close()
                return
            except OSError as error:
                problem = error.strerror or str(error) or problem
        raise self._missing("rank 0", f" ({problem})")

    def _until_all(self, store: TCPStore) -> None:
        here = store.add(self.name, 1)
        for _ in self._ticks(f"the other ranks of {self.count} at {self.host}:{self.port}"):
            if here >= self.count:
                return
            here = store.add(self.name, 0)
        away = [rank for rank in range(self.count) if not store.check([f"{self.name}/{rank}"])]
        who = ", ".join(map(str, away[:8])) + (f" and {len(away) - 8} more" if len(away) > 8 else "")
        raise self._missing(f"rank{'s' if len(away) > 1 else ''} {who}")

    def _ticks(self, whom: str) -> Iterator[float]:
        """The seconds left, yielded ever less often until none are; one message when it takes long."""
        pause, told = 0.02, False
        while (left := self.timeout - (time.monotonic() - self.started)) > 0:
            yield left
            if not told and self.timeout - left > _QUIET:
                told = True
                print(
                    f"rank {self.rank} is waiting for {whom}, at most {self.timeout:g} s (--ddp_timeout)",
                    file=sys.stderr,
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, 1.0)

    def _missing(self, who: str, why: str = "") -> DeviceError:
        return DeviceError(
            f"rank {self.rank} of {self.count} on {socket.gethostname()}: {who} did not come to {self.host}:{self.port}"
            f" within {self.timeout:g} s{why}. See what the missing ranks printed; check that all have the same "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT and can reach that host, or give them longer by --ddp_timeout."
        )

    def _gone(self, error: Exception, here: bool) -> DeviceError:
        first = str(error).strip().partition("\n")[0][:200]
        advice = (
            "It must be an address of this host and a free port: set another MASTER_PORT for all ranks."
            if here
            else "Rank 0 has stopped, or something else listens there: see what rank 0 printed."
        )
        return DeviceError(
            f"rank {self.rank} of {self.count} on {socket.gethostname()}: the rendezvous at {self.host}:{self.port}"
            f" failed ({first}). {advice}"
        )
