"""The recipes in runs/: bash takes them, and every flag in them is one that the command they end in knows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from preftree.config.prepare import parse_settings as parse_prepare
from preftree.config.train import parse_settings

ROOT = Path(__file__).parents[1]
SHOW = "#!/bin/sh\nprintf '%s\\n' \"$@\"\n"


def words(recipe: str, folder: Path, **variables: str) -> list[str]:
    """What the recipe calls Python with; srun shows it in Python's place."""
    for name, script in (("python", SHOW), ("srun", SHOW), ("scontrol", "#!/bin/sh\necho node1\necho node2\n")):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
    done = subprocess.run(
        ["bash", ROOT / "runs" / recipe, "--seed", "7"],
        env={**environment, "OUTPUT": str(folder / "O"), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("recipe", "variables", "before"),
    [
        ("cpu.sh", {}, []),
        ("cuda.sh", {}, []),
        ("gaudi.sh", {}, []),
        ("gaudi.sh", {"CARDS": "8"}, ["gaudi_spawn.py", "--world_size", "8", "--use_mpi"]),
        ("slurm.sh", {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
                      "SLURM_JOB_ID": "5"}, ["--rdzv_endpoint", "node1:29500"]),
    ],
)  # fmt: skip
def test_training(recipe: str, variables: dict[str, str], before: list[str], tmp_path: Path) -> None:
    called = words(recipe, tmp_path, **variables)
    start = called.index("dpo_clm.py")
    assert " ".join(before) in " ".join(called[:start])
    settings = parse_settings(called[start + 1 :])
    assert settings.train.seed == 7
    assert settings.train.output_dir == str(tmp_path / "O")
    assert settings.lora.lora_rank == 16


def test_a_requeued_job_goes_on(tmp_path: Path) -> None:
    variables = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "N", "SLURM_NNODES": "1", "SLURM_JOB_ID": "5"}
    (tmp_path / "O" / "checkpoint-10").mkdir(parents=True)
    assert "--resume_from_checkpoint" in words("slurm.sh", tmp_path, **variables)


def test_prepare(tmp_path: Path) -> None:
    called = words("prepare_orca.sh", tmp_path)
    assert called[:3] == ["-m", "preftree", "prepare"]
    settings = parse_prepare(called[3:])
    assert settings.generate.max_new_tokens == 512
