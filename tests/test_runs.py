"""The recipes in runs/: bash takes them, and every flag in them is one that the command they end in knows."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from preftree.config.prepare import parse_settings as parse_prepare
from preftree.config.train import parse_settings
from preftree.sweep.grid import read_grid
from tests.support.documented import PARSERS

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


#: Writes down what it is called with, and makes what the next step of the script reads.
STAND_IN = r"""#!/bin/bash
printf '%s\t' "${@:3}" >>"$CALLS"; echo >>"$CALLS"
for ((i = 1; i < $#; i++)); do
    j=$((i + 1))
    case "${!i}" in --out|--output_dir) mkdir -p "${!j}" ;; --html) echo >"${!j}" ;; esac
done
case "$3" in
    prepare) for i in {1..10}; do echo "{}"; done >"$OUT/prepared/train.jsonl" ;;
    sweep)
        folder="$OUT/sweep/$(basename "$4" .yaml)"
        mkdir -p "$folder"
        echo "{model_name_or_path: M, dataset_name: D}" >"$folder/best.yaml" ;;
esac
"""


def test_the_small_reproduction(tmp_path: Path) -> None:
    python, data, out, calls = tmp_path / "python", tmp_path / "D", tmp_path / "O", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (data / "pref").mkdir(parents=True)
    (data / "pref" / "orca_pairs.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(1, 13)))
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(calls), "OUT": str(out)}

    def called() -> list[list[str]]:
        calls.write_text("")
        subprocess.run(["bash", ROOT / "runs/reproduce_small.sh", data, out], env=environment, check=True, timeout=60)
        return [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]

    first = called()
    for words in first:
        PARSERS.get(words[0], lambda words: None)(words[1:])
    assert Counter(words[0] for words in first) == {
        "check": 2, "prepare": 1, "sweep": 2, "evaluate": 2 + 6, "train": 6, "compare": 6, "demo": 10
    }  # fmt: skip
    assert (out / "data/orca-validation.jsonl").read_text() == '{"n": 5}\n{"n": 10}\n'
    assert (out / "data/orca-test.jsonl").read_text() == '{"n": 1}\n{"n": 6}\n{"n": 11}\n'
    assert len((out / "data/orca-train.jsonl").read_text().splitlines()) == 12 - 5
    grid = read_grid(out / "orca.yaml")
    assert len(grid.runs) == 4
    settings = grid.runs[-1].settings
    assert (settings.train.learning_rate, settings.train.warmup_steps, settings.lora.lora_rank) == (5e-4, 0.1, 16)
    assert settings.lora.lora_target_modules == ["k_proj", "q_proj", "v_proj"]
    # Started again: what is done stays; trainings know it by themselves, and tables are made anew.
    assert Counter(words[0] for words in called()) == {"train": 6, "compare": 6, "demo": 5}
