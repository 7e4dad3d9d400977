"""A real run, killed at random moments and started again by the same command until it ends by itself.

    python -m tests.chaos.driver --out DIR --trials 20 --seed 1 --ranks 1

The run: 83 pairs in batches of 4 over two epochs, a checkpoint every 5 steps, validation every 10. What must be
bit-identical to the undisturbed run: the adapter, every logged number that is not a time, the random state and the
optimizer of the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

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

    def begin(self, attempt: int) -> list[Any]:
        folder = self.output.parent / f"{self.output.name}-said" / str(attempt)
        cache = self.output.parent / f"{self.output.name}-cache"  # of its own: nothing is taken from another run's
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFTREE_CACHE", str(cache))
            return start(self.argv, self.ranks, folder, launcher=as_torchrun if self.ranks > 1 else _alone)

    def printed(self, attempt: int) -> str:
        folder = self.output.parent / f"{self.output.name}-said" / str(attempt)
        return "\n".join(said(folder, self.ranks))


def _alone(rank: int, count: int) -> dict[str, str]:
    """No launcher."""
    return {}


def undisturbed(run: Run) -> float:
    """Run it to its end; returns the seconds it took."""
    began = time.perf_counter()
    codes = finish(run.begin(0))
    if codes != [0] * run.ranks:
        raise SystemExit(f"the undisturbed run ended with {codes}:\n{run.printed(0)}")
    return time.perf_counter() - began


def disturbed(run: Run, seed: int, seconds: float, most_kills: int = 8) -> list[float]:
    """Kill the run at random moments until it ends by itself; returns after how many seconds each kill came."""
    chance = random.Random(seed)
    kills: list[float] = []
    while True:
        processes = run.begin(len(kills) + 1)
        wait = chance.uniform(0, seconds) if len(kills) < most_kills else 600
        deadline = time.monotonic() + wait
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        if any(process.is_alive() for process in processes):
            for process in processes:
                process.kill()
            finish(processes)
            kills.append(wait)
            continue
        codes = [process.exitcode for process in processes]
        if codes != [0] * run.ranks:
            raise AssertionError(f"after kills at {kills} it ended with {codes}:\n{run.printed(len(kills) + 1)}")
        return kills


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


def trials(folder: Path, count: int, seed: int, ranks: int) -> int:
    """Run `count` disturbed runs beside one that is not; prints a line each and returns how many were identical."""
    inputs = write_inputs(_made(folder / "inputs"), pairs=PAIRS)
    expected = Run.of(inputs, folder / "undisturbed", ranks)
    undisturbed(expected)
    again = Run.of(inputs, folder / "again", ranks)
    seconds = undisturbed(again)  # the first one also waits for the server that processes are forked from
    problems = differences(again, expected)
    print(f"undisturbed twice: {'; '.join(problems) or 'bit-identical'}; {seconds:.1f} s on {ranks} ranks")
    good = 0
    for number in range(count):
        run = Run.of(inputs, folder / f"trial{number}", ranks)
        kills = disturbed(run, seed + number, seconds)
        problems = differences(run, expected)
        good += not problems
        when = ", ".join(f"{moment:.2f}" for moment in kills) or "none"
        print(f"trial {number}, seed {seed + number}: kills after {when} s: {'; '.join(problems) or 'bit-identical'}")
    print(f"{good} of {count} bit-identical")
    return good


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for all runs; by default one that is deleted")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        folder = asked.out or Path(spare)
        return 0 if trials(folder, asked.trials, asked.seed, asked.ranks) == asked.trials else 1


if __name__ == "__main__":
    sys.exit(main())
