"""The wheel: what is in it and what is not, and that what is installed from it works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves files beside the source."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "dpo_clm.py", "gaudi_spawn.py"):
        shutil.copy(ROOT / name, source)
    for name in ("preftree", "tests", "scripts", "benchmarks"):
        unneeded = ("__pycache__", *(["samples"] if name == "tests" else []))
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*unneeded))
    build = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(place), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = place.glob("preftree-*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    unwanted = ("__pycache__", ".pyc", "preftree.egg-info")
    files = (path for path in (ROOT / "preftree").rglob("*") if path.is_file())
    expected = {str(path.relative_to(ROOT)) for path in files if not any(word in str(path) for word in unwanted)}
    assert {name for name in held if ".dist-info/" not in name} == expected
    for needed in ("preftree/py.typed", "preftree/demo/data/train.jsonl"):
        assert needed in held
    endings = {Path(name).suffix for name in expected}
    assert endings >= {".py", ".cpp", ".h", ".j2", ".jsonl", ".typed"}


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(names["METADATA"]).decode()
        commands = archive.read(names["entry_points.txt"]).decode()
    assert "LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Provides-Extra: eval" in metadata
    assert "preftree = preftree.cli:main" in commands


def test_what_is_installed_from_it_works_away_from_the_checkout(wheel: Path, samples: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install = [*PIP, "install", "--quiet", "--no-deps", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(target), "PREFTREE_CACHE": str(tmp_path / "cache")}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    data = str(samples / "pref" / "orca_pairs.jsonl")
    report = tmp_path / "report.html"
    checked = run(str(target / "bin" / "preftree"), "check", data, "--html", str(report))
    assert checked.returncode == 1, checked.stderr  # these pairs prefer short answers
    assert "<html" in report.read_text("utf-8")
    count = "from preftree.demo.rows import read_split; print(len(read_split('train')), len(read_split('heldout')))"
    rows = run(sys.executable, "-c", count)
    assert rows.stdout == "471 101\n", rows.stderr
