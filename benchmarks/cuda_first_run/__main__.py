"""The steps of scripts/cuda_first_run.sh, each in a process of its own with its own time limit.

python benchmarks/cuda_first_run --output DIR            ten minutes on one H100
python benchmarks/cuda_first_run --device cpu --tiny     the same logic on a CPU, in about two minutes
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import training
from goals import summary_lines
from needs import CARRIED, MACHINE, OPTIONAL, collect_command, missing, unpack
from report import read, write

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Step:
    """One step: its file beside this one, and the seconds it may take on one H100."""

    name: str
    seconds: int


#: Together with starts and ends under ten minutes.
STEPS = (Step("exactness", 160), Step("training", 80), Step("speed", 290), Step("profile_step", 45))


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that steps are stopped with this process
    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    site = output / "site"
    wheels = os.environ.get("PREFTREE_WHEELS")
    carried = unpack(Path(wheels).resolve() if wheels else None, site)
    if not _can_start(site, carried):
        return 2
    environment = _environment(site)
    steps = [step for step in STEPS if step.name in args.steps]
    for step in steps:
        (output / f"{step.name}.json").unlink(missing_ok=True)
    reference = None
    if "training" in args.steps:
        training.start_anew(output)
        # Some cores are left for what drives the card and compiles its kernels.
        threads = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - 4)))}
        reference = _start("training", output, args, environment | threads, "--reference")
    results: dict[str, Any] = {}
    try:
        for step in steps:
            print(f"\n== {step.name}, at most {step.seconds} s", flush=True)
            code = _run(step, output, args, environment)
            if step.name == "training" and reference is not None:
                _stop(reference, patience=60 * args.factor if args.tiny else 0)
                training.add_reference(output)
            results[step.name] = {"exit_code": code, **read(output / f"{step.name}.json")}
            write(output / "summary.json", {"device": args.device, "tiny": args.tiny, "steps": results})
    finally:
        if reference is not None:
            _stop(reference)
    print("\n" + "\n".join(summary_lines(results)))
    print(f"\nall numbers: {output / 'summary.json'}")
    return 0 if all(found.get("complete") and found["exit_code"] == 0 for found in results.values()) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="outputs/cuda-first-run")
    parser.add_argument("--steps", nargs="+", default=names, choices=names)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself")
    parser.add_argument("--factor", type=float, default=1.0, help="multiplies every time limit")
    return parser.parse_args()


def _can_start(site: Path, carried: list[str]) -> bool:
    """Say what is missing; false where a step could not run at all."""
    print(f"carried    {', '.join(carried) or 'nothing (PREFTREE_WHEELS names no folder with wheels)'}", flush=True)
    for package in missing(OPTIONAL, site):
        print(f"note       {package.module} is not here: {package.why}", flush=True)
    lacking = missing((*MACHINE, *CARRIED), site)
    if not lacking:
        return True
    print(f"missing    {', '.join(package.module for package in lacking)}", flush=True)
    if any(package.wheel for package in lacking):
        print(f"collect what can be carried where there is a network:\n\n    {collect_command()}\n", flush=True)
        print("and name the folder by PREFTREE_WHEELS", flush=True)
    return False


def _environment(site: Path) -> dict[str, str]:
    """What the steps see: this checkout and the carried wheels first, no network, one card."""
    path = [str(ROOT), str(HERE.parent), str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # is_available() does not touch the card, so that processes can be forked
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }


def _start(
    name: str, output: Path, args: argparse.Namespace, environment: dict[str, str], *more: str
) -> subprocess.Popen[bytes]:
    """A step's process, in a session of its own so that all that it started can be stopped with it."""
    step = next(step for step in STEPS if step.name == name)
    command = [sys.executable, str(HERE / f"{name}.py"), "--device", args.device, "--output", str(output)]
    command += ["--seconds", str(step.seconds * args.factor), *more, *(["--tiny"] if args.tiny else [])]
    log = open(output / f"{name}{'-reference' if more else ''}.log", "wb") if more else None  # noqa: SIM115
    try:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
    finally:
        if log is not None:
            log.close()


def _run(step: Step, output: Path, args: argparse.Namespace, environment: dict[str, str]) -> int:
    """Run a step to its end or its limit; its exit code, or −9 where it was stopped."""
    started = time.monotonic()
    process = _start(step.name, output, args, environment)
    try:
        code = process.wait(step.seconds * args.factor)
    except subprocess.TimeoutExpired:
        print(f"stopped    {step.name} after {step.seconds * args.factor:.0f} s; what it found is kept", flush=True)
        return -9
    finally:
        _stop(process)
    print(f"took       {time.monotonic() - started:.0f} s, exit code {code}", flush=True)
    return code


def _stop(process: subprocess.Popen[bytes], patience: float = 0) -> None:
    """End a process that was started here, and its children, unless it ends by itself within `patience` seconds."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
