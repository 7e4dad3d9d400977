"""Start a training script on several Intel Gaudi cards, with the original launcher's options.

    python gaudi_spawn.py --world_size 8 --use_mpi dpo_clm.py --use_habana …
    python gaudi_spawn.py --hostfile HOSTS --use_mpi dpo_clm.py --use_habana …

Standard library only. The command is a list of words and never a shell string; its exit code is passed on.
Contract-tested, not hardware-tested.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: `NAME slots=N`."""

    name: str
    slots: int


def build_parser() -> argparse.ArgumentParser:
    """The launcher's own options; everything after the script belongs to the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world_size", type=int, default=1, help="cards per host (default: 1)")
    parser.add_argument("--hostfile", type=Path, help="file with one 'NAME slots=N' line per host")
    parser.add_argument("--use_mpi", action="store_true", help="start the ranks with mpirun")
    parser.add_argument("--use_deepspeed", action="store_true", help="start the ranks with deepspeed")
    parser.add_argument("--master_port", type=int, default=29500, help="port of the rendezvous (default: 29500)")
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own flags")
    return parser


def build_command(argv: Sequence[str], cores: int) -> list[str]:
    """The command that starts the ranks, for a host with that many physical cores.

    Wrong options end with argparse's message and exit code 2.
    """
    parser = build_parser()
    options = parser.parse_args(list(argv))
    if options.use_mpi and options.use_deepspeed:
        parser.error("--use_mpi and --use_deepspeed contradict each other: leave one of them out")
    if options.world_size < 1:
        parser.error(f"--world_size must be at least 1, got {options.world_size}")
    hosts: list[Host] = []
    if options.hostfile:
        if not (options.use_mpi or options.use_deepspeed):
            parser.error("--hostfile needs --use_mpi or --use_deepspeed, which can start ranks on other hosts")
        try:
            hosts = read_hostfile(options.hostfile, options.world_size)
        except (OSError, ValueError) as error:
            parser.error(f"--hostfile {options.hostfile}: {error}")
    script = [options.script, *options.arguments]
    if options.use_mpi:
        return [*_mpirun(options, hosts, cores), sys.executable, *script]
    if options.use_deepspeed:
        return [*_deepspeed(options, hosts), *script]
    if options.world_size == 1:
        return [sys.executable, *script]
    port = f"--master_port={options.master_port}"
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={options.world_size}",
        port,
        *script,
    ]


def _mpirun(options: argparse.Namespace, hosts: Sequence[Host], cores: int) -> list[str]:
    ranks = sum(host.slots for host in hosts) or options.world_size
    on_one_host = max((host.slots for host in hosts), default=options.world_size)
    command = ["mpirun", "-n", str(ranks)]
    if on_one_host <= cores:
        command += ["--bind-to", "core", "--map-by", f"socket:PE={cores // on_one_host}"]
    else:  # more ranks than cores: there is nothing to bind to
        command += ["--bind-to", "none", "--oversubscribe"]
    # --rank-by core, which the original used, is rejected by Open MPI 5.
    command += ["--rank-by", "slot", "--report-bindings", "--allow-run-as-root"]
    if hosts:
        command += ["--hostfile", str(options.hostfile), "-x", f"MASTER_ADDR={hosts[0].name}"]
    return [*command, "-x", f"MASTER_PORT={options.master_port}"]


def _deepspeed(options: argparse.Namespace, hosts: Sequence[Host]) -> list[str]:
    port = ["--no_local_rank", "--master_port", str(options.master_port)]
    if not hosts:
        return ["deepspeed", "--num_nodes", "1", "--num_gpus", str(options.world_size), *port]
    where = ["--hostfile", str(options.hostfile), "--master_addr", hosts[0].name]
    return ["deepspeed", "--force_multi", *where, *port]


def read_hostfile(path: Path, default_slots: int) -> list[Host]:
    """The hosts of a hostfile; a line without slots= gets `default_slots`. Raises ValueError, OSError."""
    hosts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = next((word.removeprefix("slots=") for word in words[1:] if word.startswith("slots=")), None)
        if slots is not None and not (slots.isdigit() and int(slots)):
            raise ValueError(f"line {number}: slots must be a whole number above 0, got {slots!r}")
        hosts.append(Host(words[0], int(slots) if slots else default_slots))
    if not hosts:
        raise ValueError("no host in it; write one 'NAME slots=N' line per host")
    return hosts


def physical_cores(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """Cores of this host, not counting hardware threads: what mpirun binds ranks to."""
    try:
        blocks = cpuinfo.read_text().split("\n\n")
    except OSError:
        return os.cpu_count() or 1
    cores = set()
    for block in blocks:
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        entry = {key.strip(): value.strip() for key, value in pairs}
        if "core id" in entry:
            cores.add((entry.get("physical id"), entry["core id"]))
    return len(cores) or os.cpu_count() or 1


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, 128 + signal number when a signal ended it."""
    command = build_command(argv, physical_cores())
    print(shlex.join(command), flush=True)
    try:
        code = subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        print(f"error: {command[0]} is not installed here; install it or leave its flag out.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
