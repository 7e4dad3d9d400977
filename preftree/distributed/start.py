"""Starting torch's process group: the one step between settings and a stage that touches the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from typing import TypeVar

from preftree.distributed.launcher import check_world_size
from preftree.distributed.rendezvous import rendezvous
from preftree.distributed.sharding import hide_from_accelerate
from preftree.errors import DeviceError

T = TypeVar("T")


def start_ranks(
    make: Callable[[], T],
    *,
    timeout: float,
    world_size: Callable[[T], int],
    environ: MutableMapping[str, str] = os.environ,
) -> T:
    """Wait for all ranks, then call `make`, which starts the process group (transformers' arguments do).

    Args:
        timeout: seconds until the rendezvous is given up.
        world_size: of what `make` returns, the number of ranks in its process group.

    Raises:
        DeviceError: some ranks did not come, were lost, or found another group.
    """
    hide_from_accelerate(environ)
    store = rendezvous(timeout, environ)
    try:
        made = make()
    except RuntimeError as error:
        if "WORLD_SIZE" not in environ:
            raise
        where = f"{environ.get('MASTER_ADDR', '?')}:{environ.get('MASTER_PORT', '?')}"
        raise DeviceError(f"the ranks lost each other at {where}: {str(error).splitlines()[0]}") from error
    del store  # torch's process group has started and keeps its own
    check_world_size(world_size(made), environ)
    return made
