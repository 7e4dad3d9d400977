"""What Intel Gaudi needs before torch is imported. Standard library only; nothing of the vendor's is loaded.

Contract-tested, not hardware-tested.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from preftree.distributed.launcher import ranks_for
from preftree.errors import DeviceError

_FALSE = {"false", "f", "no", "n", "0"}


def bootstrap(argv: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Set the variables that torch and the Gaudi stack read while they are imported; returns what was set.

    Must be called before torch is imported. Under mpirun and srun the ranks are passed on under the names that torch
    reads: without that every rank would silently train alone.
    """
    changes = environment_for(argv, environ)
    environ.update(changes)
    return changes


def environment_for(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that `bootstrap` sets for a command line in an environment.

    Raises DeviceError when there are other ranks and it is not said how to find them.
    """
    lazy = "1" if flag_is_on(argv, "use_lazy_mode") else "0"
    return {"PT_HPU_LAZY_MODE": lazy, **ranks_for(environ)}


def require_gaudi() -> None:
    """Raise DeviceError unless the Gaudi software stack can be imported."""
    if importlib.util.find_spec("habana_frameworks") is None:
        raise DeviceError(
            "--use_habana: the Intel Gaudi software is not installed here (Python package habana_frameworks,"
            " which comes with the vendor's PyTorch image). Run in that image, on a machine with Gaudi cards,"
            " or leave out --use_habana, --use_lazy_mode and --use_hpu_graphs_for_training."
        )


def flag_is_on(argv: Sequence[str], name: str) -> bool:
    """Whether a boolean flag is on: --name, --name true, --name=true, or `name: true` in a YAML file."""
    on = False
    if argv and argv[0].endswith((".yaml", ".yml")):
        on = _yaml_is_on(Path(argv[0]), name)
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            value = value if equals else "true" if following.startswith("-") else following
            on = value.lower() not in _FALSE
    return on


def _yaml_is_on(path: Path, name: str) -> bool:
    # A line pattern and no YAML reader: this runs before anything but the standard library may be imported.
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False  # the settings parser will say so
    found = re.search(rf"^{name.replace('_', '[_-]')}\s*:\s*[\"']?(\w+)", text, re.MULTILINE)
    return bool(found) and found[1].lower() not in _FALSE | {"off", "null"}  # type: ignore[index]
