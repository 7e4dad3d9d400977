"""Kill `preftree prepare` at random moments and compare what it ends with, byte for byte, with an unharmed run.

    python -m tests.support.kills --out FOLDER [--kills 5] [--seed 0] [--] [flags of preftree prepare]

Without flags: 50 prompts of tests/samples/pref/openorca_questions.jsonl, 4 answers each, and the bundled model. Each
run is a process of its own, forked before anything is computed (importing torch again would take longer than the work),
and killed with SIGKILL. If it ends before it was killed that many times, all starts again with earlier kills.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preftree.config.prepare import parse_settings
from preftree.prepare.folder import PrepareFolder
from preftree.prepare.run import prepare

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "samples"
FULL = f"""
    --dataset_name {DATA}/pref/openorca_questions.jsonl --decontaminate {DATA}/eval
    --model_name_or_path smollm2 --num_samples 50 --num_rejected 4 --max_new_tokens 16 --cut_answers keep
    --max_prompt_length 144 --max_answer_length 256
""".split()
RESULTS = ("train.jsonl", "manifest.yaml", "README.md", ".prepare/selected.jsonl", ".prepare/answers.jsonl")


@dataclass(frozen=True)
class Kill:
    """When a run was killed, in seconds after its start, and how many units its journal held then."""

    seconds: float
    units: int


def run(flags: Sequence[str], out: Path) -> int:
    """Start a run in a process of its own; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        with open(f"{out}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            prepare(parse_settings([*flags, "--output_dir", str(out)]))
        code = 0
    finally:
        os._exit(code)


def finish(flags: Sequence[str], out: Path) -> float:
    """Run to the end; the seconds it took. Raises RuntimeError where it fails."""
    started = time.perf_counter()
    _, status = os.waitpid(run(flags, out), 0)
    if status:
        raise RuntimeError(f"the run failed:\n{Path(f'{out}.log').read_text()}")
    return time.perf_counter() - started


def killed(flags: Sequence[str], out: Path, at: int, delay: float) -> Kill | None:
    """Start (or go on with) a run and kill it `delay` seconds after its journal holds `at` units; None where it was
    done by then."""
    child = run(flags, out)
    started, reached = time.perf_counter(), None
    while reached is None or time.perf_counter() - reached < delay:
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        if reached is None and units(out) >= at:
            reached = time.perf_counter()
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return Kill(time.perf_counter() - started, units(out)) if os.WIFSIGNALED(status) else None


def units(out: Path) -> int:
    """Whole lines in the journal."""
    path = PrepareFolder(str(out), "jsonl").answers
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(flags: Sequence[str], folder: Path, kills: int, seed: int) -> tuple[list[Kill], list[str]]:
    """An unharmed run and one that is killed so often; the kills, and the names of files that differ."""
    whole, harmed, rng = folder / "whole", folder / "harmed", random.Random(seed)
    seconds = finish(flags, whole)
    total = units(whole)
    done: list[Kill] = []
    while len(done) < kills:
        # Somewhere in the part of the work that is this kill's, and somewhere within a batch.
        part = total / kills
        at = int((len(done) + rng.random()) * part)
        kill = killed(flags, harmed, at, rng.uniform(0, seconds / total))
        if kill is None:  # it was done before it was killed so often: once more from the start, with shorter lives
            shutil.rmtree(harmed)
            done, seconds = [], seconds / 2
        else:
            done.append(kill)
    finish(flags, harmed)
    names = [name for name in RESULTS if (whole / name).read_bytes() != (harmed / name).read_bytes()]
    return done, names


def main(argv: Sequence[str]) -> int:
    """The command line: 0 where both ends are equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.kills", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="flags of preftree prepare, behind --")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    kills, differing = compare(options.flags or FULL, options.out, options.kills, options.seed)
    total = units(options.out / "whole")
    for kill in kills:
        print(f"killed after {kill.seconds:.2f} s with {kill.units} of {total} batches in the journal")
    if differing:
        print(f"DIFFERENT: {', '.join(differing)}")
        return 1
    sizes = ", ".join(f"{name} {(options.out / 'whole' / name).stat().st_size:,} bytes" for name in RESULTS)
    print(f"equal, byte for byte: {sizes} ({time.perf_counter() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
