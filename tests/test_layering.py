"""Imports point one way, so that each part can be read, tested and replaced without those above it.

errors ← forest ← model ← train, evaluate ← cli
"""

from __future__ import annotations

import ast
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "preftree").rglob("*.py"))
}

BASE = {"errors"}
COMMON = BASE | {"io", "distributed", "config", "hardware"}
STAGE = COMMON | {"forest", "data", "model", "text"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "benchmarks": set(),
    "io": BASE,
    "forest": BASE,
    "distributed": BASE,
    "config": BASE | {"benchmarks", "distributed", "io"},
    "hardware": BASE | {"distributed", "config", "io"},
    "data": BASE | {"io", "hardware"},
    "text": BASE | {"benchmarks", "data"},
    "model": BASE | {"forest", "io"},
    "check": STAGE,
    "publish": STAGE,
    "train": STAGE | {"check", "health", "publish"},
    "evaluate": STAGE | {"benchmarks"},
    "prepare": STAGE | {"benchmarks"},
    "demo": STAGE | {"train", "evaluate", "prepare", "report"},
    "health": BASE,
    "pipeline": STAGE,
    "sweep": STAGE | {"train", "report", "pipeline", "sweep"},
    "report": BASE | {"io", "config", "health", "text"},
    "merge": STAGE | {"evaluate", "publish"},
    "samples": STAGE,
    "chat": STAGE | {"samples"},
    "export": STAGE | {"merge"},
    "winrate": STAGE | {"samples", "prepare", "evaluate"},
    "cli": STAGE
    | {"prepare", "check", "train", "evaluate", "demo", "report", "pipeline", "sweep"}
    | {"merge", "samples", "chat", "winrate", "export"},
    "api": STAGE | {"prepare", "check", "evaluate"},
    "__main__": {"cli"},
}
"""What each part may import from this package, beside itself and the package's version."""

OTHERS: dict[str, set[str]] = {
    "errors": set(),
    "benchmarks": set(),
    "distributed.gaudi": set(),
    "distributed.launcher": set(),
    "distributed.sharding": set(),
    "forest": {"torch"},
    "cli": {"typer"},
}
"""What the lightest parts may import from outside the standard library."""


def imports(path: Path) -> set[str]:
    """The absolute names of all modules a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def part(module: str) -> str:
    """The part of the package that a module belongs to: 'model' for preftree.model.load."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_point_one_way(module: str) -> None:
    here = part(module)
    assert here in ALLOWED, f"say in ALLOWED what preftree.{here} may import"
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        if top == "preftree":
            assert part(name) in ALLOWED[here] | {here, ""}, f"{module} must not import {name}"
        elif top not in sys.stdlib_module_names:
            for light, others in OTHERS.items():
                if module == f"preftree.{light}" or module.startswith(f"preftree.{light}."):
                    assert top in others, f"{module} must do without {top}"


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while ready := {name for name, below in ALLOWED.items() if name not in done and below <= done | {name}}:
        done |= ready
    assert done == set(ALLOWED)


def test_every_imported_module_of_ours_exists() -> None:
    missing = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports(path)
        if name.split(".")[0] == "preftree" and name not in MODULES
    }
    assert not missing


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_can_be_imported(module: str) -> None:
    assert find_spec(module) is not None
    importlib.import_module(module)
