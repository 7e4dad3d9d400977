"""A real run, killed at random moments and started again by the same command until it ends by itself.

    python -m tests.chaos.driver --out DIR --trials 20 --seed 1 --ranks 1

The run: 83 pairs in batches of 4 over two epochs, a checkpoint every 5 steps, validation every 10. What must be
bit-identical to the undisturbed run: the adapter, every logged number that is not a time, the random state and the
optimizer of the last checkpoint.

Every other kill of a trial comes at a random moment; those between, the first one among them, within a phase that
is drawn (evaluation, reference pass, checkpoint, step, caching). Of several ranks one is killed, and the others a
random moment later, as a launcher does. All trials share the compiled kernels, or most kills would hit the compiler.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing.connection
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from preftree.io.cache import cache_root
from tests.chaos import phases
from tests.support.command import command, history, write_inputs
from tests.support.ranks import as_torchrun, finish, said, start

PAIRS, BATCH = 83, 4
#: Logged numbers that are times or follow from times.
TIMED = ("runtime", "per_second", "tokens_per_second", "pairs_per_second", "mfu", "total_flos", "memory")


@dataclass(frozen=True)
class Run:
    """A run's command line and what it leaves."""

    output: Path
    argv: list[str]
    ranks: int

    @classmethod
    def of(cls, inputs: Path, output: Path, ranks: int) -> Run:
        flags = command(
            inputs,
            output,
            per_device_train_batch_size=BATCH // ranks,
            num_train_epochs=2,
            max_steps=-1,
            save_steps=5,
            save_total_limit=3,
            eval_strategy="steps",
            eval_steps=10,
            logging_steps=3,
            lora_dropout=0.1,
            disable_dropout="false",  # so that the random state matters
            validation_split_percentage=10,
        )
        return cls(output, flags, ranks)

    def begin(self, attempt: int, aim: Aim | None = None) -> list[Any]:
        folder = self.said / str(attempt)
        for rank in range(self.ranks):
            phases.prepare(folder / f"phase{rank}")

        def variables(rank: int, count: int) -> dict[str, str]:
            own = as_torchrun(rank, count) if count > 1 else {}
            if aim is not None and aim.rank == rank:
                own["KILL_IN"] = f"{aim.phase},{aim.entry},{aim.after}"
            return {**own, "PHASE_FILE": str(folder / f"phase{rank}")}

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFTREE_CACHE", str(self.cache))
            return start(self.argv, self.ranks, folder, launcher=variables)

    @property
    def said(self) -> Path:
        """Where what it prints goes, and its phases."""
        return self.output.parent / f"{self.output.name}-said"

    @property
    def cache(self) -> Path:
        """A cache folder of its own: nothing is taken from another run's but the kernels."""
        return self.output.parent / f"{self.output.name}-cache"

    def phase(self, attempt: int, rank: int) -> str:
        """What a rank was doing when it ended."""
        return phases.read(self.said / str(attempt) / f"phase{rank}")

    def printed(self, attempt: int) -> str:
        return "\n".join(said(self.said / str(attempt), self.ranks))


@dataclass(frozen=True)
class Aim:
    """A kill within a phase of one rank: at this entry into it, after so many seconds."""

    phase: str
    entry: int
    after: float
    rank: int


@dataclass(frozen=True)
class Kill:
    """Which rank was killed first and what it was doing."""

    rank: int
    phase: str


def undisturbed(run: Run) -> float:
    """Run it to its end; returns the seconds it took."""
    began = time.perf_counter()
    codes = finish(run.begin(0))
    if codes != [0] * run.ranks:
        raise SystemExit(f"the undisturbed run ended with {codes}:\n{run.printed(0)}")
    return time.perf_counter() - began


def disturbed(run: Run, seed: int, seconds: float, most_kills: int) -> list[Kill]:
    """Kill the run again and again until it ends by itself.

    Args:
        seconds: what an undisturbed run takes.
    """
    chance = random.Random(seed)
    names = list(phases.PHASES)
    kills: list[Kill] = []
    for attempt in range(1, 100):
        rank, wait, aim = chance.randrange(run.ranks), 600.0, None
        if len(kills) < most_kills and attempt % 2:
            phase = names[(seed + attempt // 2) % len(names)]
            aim = Aim(phase, chance.randint(1, 3), chance.uniform(0, phases.SECONDS[phase]), rank)
        elif len(kills) < most_kills:
            wait = chance.uniform(0, seconds)
        processes = run.begin(attempt, aim)
        if killed_one(processes, rank, wait):
            time.sleep(chance.uniform(0, 0.3) if run.ranks > 1 else 0)
            for process in processes:
                process.kill()
            finish(processes)
            kills.append(Kill(rank, run.phase(attempt, rank)))
            continue
        codes = [process.exitcode for process in processes]
        if codes != [0] * run.ranks:
            raise AssertionError(f"after {len(kills)} kills it ended with {codes}:\n{run.printed(attempt)}")
        return kills
    raise AssertionError("it never ended by itself")


def killed_one(processes: Sequence[Any], rank: int, wait: float) -> bool:
    """Wait until all end (false), one dies by the kill aimed at it, or `wait` seconds are over and `rank` is killed."""
    deadline = time.monotonic() + wait
    left = list(processes)
    while left:
        ready = multiprocessing.connection.wait([one.sentinel for one in left], max(0, deadline - time.monotonic()))
        if not ready:
            processes[rank].kill()
            return True
        if any(one.exitcode == -signal.SIGALRM for one in left if one.sentinel in ready):
            return True
        left = [one for one in left if one.sentinel not in ready]
    return False


def differences(found: Run, expected: Run) -> list[str]:
    """What is not bit-identical, in words."""
    problems = []
    name = "adapter_model.safetensors"
    if (found.output / name).read_bytes() != (expected.output / name).read_bytes():
        problems.append("the final adapter differs")
    ours, theirs = ([_untimed(record) for record in history(run.output)] for run in (found, expected))
    if ours != theirs:
        problems.append(f"the log history differs: {_first_difference(ours, theirs)}")
    lines = [_untimed(json.loads(line)) for line in (found.output / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = [
        _untimed(json.loads(line)) for line in (expected.output / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    if lines != wanted:
        problems.append(f"run/metrics.jsonl differs: {_first_difference(lines, wanted)}")
    last = max(expected.output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for state in sorted([*last.glob("rng_state*.pth"), *last.glob("optimizer.pt"), *last.glob("scheduler.pt")]):
        other = found.output / last.name / state.name
        if not other.is_file() or not _equal(*(torch.load(path, weights_only=False) for path in (state, other))):
            problems.append(f"{last.name}/{state.name} differs")
    return problems


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not any(word in key for word in TIMED)}


def _first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    pairs = zip([*ours, *[None] * len(theirs)], [*theirs, *[None] * len(ours)], strict=False)
    return next(f"{one} instead of {other}" for one, other in pairs if one != other)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool((one == other) if not hasattr(one, "all") else (one == other).all())


def trials(folder: Path, count: int, seed: int, ranks: int, most_kills: int = 6, pairs: int = PAIRS) -> Counter[str]:
    """Run `count` disturbed runs beside one that is not, and print a line each.

    Args:
        pairs: with 43 a run has 20 steps, two epochs whose last step is smaller, and one checkpoint too many to keep.

    Returns how many were "bit-identical", and by phase how many kills hit it.
    """
    inputs = write_inputs(_made(folder / "inputs"), pairs=pairs)
    expected = Run.of(inputs, folder / "undisturbed", ranks)
    _share_kernels(cache_root(), expected)
    undisturbed(expected)
    again = Run.of(inputs, folder / "again", ranks)
    _share_kernels(expected.cache, again)
    seconds = undisturbed(again)  # the first one also waits for the server that processes are forked from
    problems = differences(again, expected)
    print(f"undisturbed twice: {'; '.join(problems) or 'bit-identical'}; {seconds:.1f} s on {ranks} ranks", flush=True)
    found: Counter[str] = Counter()
    for number in range(count):
        run = Run.of(inputs, folder / f"trial{number}", ranks)
        _share_kernels(expected.cache, run)
        kills = disturbed(run, seed + number, seconds, most_kills)
        problems = differences(run, expected)
        found.update(kill.phase for kill in kills)
        found["bit-identical"] += not problems
        where = ", ".join(f"rank {kill.rank} in {kill.phase}" for kill in kills) or "none"
        print(
            f"trial {number}, seed {seed + number}: killed {where}: {'; '.join(problems) or 'bit-identical'}",
            flush=True,
        )
    hits = ", ".join(f"{times} in {phase}" for phase, times in found.items() if phase != "bit-identical")
    print(f"{found['bit-identical']} of {count} bit-identical; kills: {hits}", flush=True)
    return found


def _share_kernels(cache: Path, run: Run) -> None:
    if (cache / "kernels").is_dir():
        shutil.copytree(cache / "kernels", run.cache / "kernels")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for all runs; by default one that is deleted")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=6, help="maximum number in a trial")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        folder = asked.out or Path(spare)
        found = trials(folder, asked.trials, asked.seed, asked.ranks, asked.kills)
        return 0 if found["bit-identical"] == asked.trials else 1


if __name__ == "__main__":
    sys.exit(main())
