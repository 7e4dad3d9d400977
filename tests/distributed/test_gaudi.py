"""What is set before torch is imported, and the commands that the launcher builds. No torch, no card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gaudi_spawn
from preftree.distributed.gaudi import bootstrap
from tests.support.launchers import HERE, OPEN_MPI, RANKS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("lazy", "environ", "changes"),
    [
        (False, {}, {"PT_HPU_LAZY_MODE": "0"}),
        (True, {}, {"PT_HPU_LAZY_MODE": "1"}),
        (True, {"PT_HPU_LAZY_MODE": "0"}, {"PT_HPU_LAZY_MODE": "1"}),
        (False, {"PT_HPU_LAZY_MODE": "1"}, {"PT_HPU_LAZY_MODE": "0"}),
        (False, OPEN_MPI, {"PT_HPU_LAZY_MODE": "0"} | RANKS | HERE),
        (False, OPEN_MPI | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, {"PT_HPU_LAZY_MODE": "0"} | RANKS),
        (False, {"RANK": "0", "WORLD_SIZE": "2"}, {"PT_HPU_LAZY_MODE": "0"}),
    ],
)
def test_the_environment_before_torch(lazy: bool, environ: dict[str, str], changes: dict[str, str]) -> None:
    copy = dict(environ)
    bootstrap(lazy, copy)
    assert copy == environ | changes


def test_bootstrap_needs_no_torch() -> None:
    code = "import sys, preftree.distributed.gaudi; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout.strip() == "False", result.stderr


PY = sys.executable
TORCHRUN = [PY, "-m", "torch.distributed.run", "--nproc_per_node=8", "--master_port=29500"]
TAIL = ["--rank-by", "slot", "--report-bindings", "--allow-run-as-root"]
PORT = ["-x", "MASTER_PORT=29500"]
SCRIPT = ["dpo_clm.py", "--bf16", "--output_dir", "a b"]


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ("", [PY, *SCRIPT]),
        ("--world_size 8", [*TORCHRUN, *SCRIPT]),
        ("--world_size 8 --use_mpi",
         ["mpirun", "-n", "8", "--bind-to", "core", "--map-by", "socket:PE=2", *TAIL, *PORT, PY, *SCRIPT]),
        ("--world_size 32 --use_mpi",
         ["mpirun", "-n", "32", "--bind-to", "none", "--oversubscribe", *TAIL, *PORT, PY, *SCRIPT]),
        ("--world_size 8 --use_deepspeed --master_port 5",
         ["deepspeed", "--num_nodes", "1", "--num_gpus", "8", "--no_local_rank",
          "--master_port", "5", *SCRIPT]),
        ("--hostfile HOSTS --use_mpi --world_size 8",
         ["mpirun", "-n", "12", "--bind-to", "core", "--map-by", "socket:PE=2", *TAIL,
          "--hostfile", "HOSTS", "-x", "MASTER_ADDR=one", *PORT, PY, *SCRIPT]),
        ("--hostfile HOSTS --use_deepspeed",
         ["deepspeed", "--force_multi", "--hostfile", "HOSTS", "--master_addr", "one", "--no_local_rank",
          "--master_port", "29500", *SCRIPT]),
    ],
)  # fmt: skip
def test_commands_of_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("HOSTS").write_text("# two hosts\none slots=4\n\ntwo\n")
    assert gaudi_spawn.build_command([*options.split(), *SCRIPT], cores=16) == command


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ("--use_mpi --use_deepspeed", "contradict each other"),
        ("--world_size 0", "must be at least 1"),
        ("--hostfile HOSTS", "needs --use_mpi or --use_deepspeed"),
        ("--hostfile NONE --use_mpi", "No such file"),
        ("--hostfile BAD --use_mpi", "line 1: slots must be"),
        ("--hostfile EMPTY --use_mpi", "no host in it"),
    ],
)
def test_wrong_options_of_the_launcher(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    piece: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("HOSTS", "one"), ("BAD", "one slots=x"), ("EMPTY", "# none\n")):
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        gaudi_spawn.build_command([*options.split(), *SCRIPT], cores=16)
    assert ended.value.code == 2
    assert piece in capsys.readouterr().err


def test_the_exit_code_is_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "with space.py"
    script.write_text("import os, signal, sys\nos.kill(os.getpid(), signal.SIGKILL) if sys.argv[1:] else sys.exit(7)\n")
    assert gaudi_spawn.main([str(script)]) == 7
    assert gaudi_spawn.main([str(script), "--kill"]) == 137
    assert "with space.py'" in capsys.readouterr().out


def test_a_missing_launcher_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gaudi_spawn.main(["--use_mpi", "x.py"]) == 2
    assert "mpirun is not installed" in capsys.readouterr().err


def test_hardware_threads_are_not_cores(tmp_path: Path) -> None:
    text = "".join(f"processor: {n}\nphysical id\t: 0\ncore id\t: {n % 2}\n\n" for n in range(4))
    (tmp_path / "cpuinfo").write_text(text)
    assert gaudi_spawn.physical_cores(tmp_path / "cpuinfo") == 2
    assert gaudi_spawn.physical_cores(tmp_path / "none") >= 1
