"""What Intel Gaudi needs before torch is imported. Standard library only; nothing of the vendor's is loaded.

Contract-tested, not hardware-tested.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping

from preftree.distributed.launcher import ranks_for
from preftree.errors import DeviceError


def bootstrap(lazy_mode: bool, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch and the Gaudi stack read while they are imported.

    Must be called before torch is imported. Under mpirun and srun the ranks are passed on under the names that torch
    reads: without that every rank would silently train alone.

    Raises:
        DeviceError: there are other ranks, and the environment does not say how to find them.
    """
    environ.update({"PT_HPU_LAZY_MODE": "1" if lazy_mode else "0", **ranks_for(environ)})


def require_gaudi() -> None:
    """Raise DeviceError unless the Gaudi software stack can be imported."""
    if importlib.util.find_spec("habana_frameworks") is None:
        raise DeviceError(
            "--use_habana: the Intel Gaudi software is not installed here (Python package habana_frameworks,"
            " which comes with the vendor's PyTorch image). Run in that image, on a machine with Gaudi cards,"
            " or leave out --use_habana, --use_lazy_mode and --use_hpu_graphs_for_training."
        )
