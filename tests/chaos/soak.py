"""A long run of a tiny model: memory and the time of a step must not grow.

    python -m tests.chaos.soak --steps 2000

Forests of all sizes, a checkpoint and an evaluation now and then, a log line every ten steps, in one process. Compared
are the quarter after warm-up and the last quarter: resident memory (its largest value) and the processor time of a
step (its median, since a busy machine stretches some steps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from preftree.cli import main_train
from preftree.train.trainer import DPOTrainer
from tests.support.command import command, write_inputs

PAIRS, BATCH = 240, 4
#: Shares of the steps: the first ones fill caches of sizes.
WARM_UP, QUARTER = 0.25, 0.25
#: Growth that is allowed.
MEMORY, TIME = 1.02, 1.10


@dataclass
class Soak:
    """Resident memory in bytes and processor seconds after each step."""

    resident: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        process, original = psutil.Process(), DPOTrainer.training_step

        def training_step(trainer: DPOTrainer, *args: Any, **others: Any) -> Tensor:
            began = time.process_time()
            loss = original(trainer, *args, **others)
            self.seconds.append(time.process_time() - began)
            self.resident.append(process.memory_info().rss)
            return loss

        patch.setattr(DPOTrainer, "training_step", training_step)

    def growth(self) -> tuple[float, float]:
        """The last quarter in units of the one after warm-up: memory, time of a step."""
        steps = len(self.resident)
        early = slice(int(WARM_UP * steps), int((WARM_UP + QUARTER) * steps))
        late = slice(int((1 - QUARTER) * steps), steps)
        memory = max(self.resident[late]) / max(self.resident[early])
        return memory, statistics.median(self.seconds[late]) / statistics.median(self.seconds[early])


def soak(folder: Path, steps: int) -> Soak:
    """Run it; raises SystemExit where the command fails."""
    write_inputs(folder, pairs=PAIRS)
    _of_all_lengths(folder / "pairs.jsonl")
    found = Soak()
    flags = command(
        folder,
        folder / "O",
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        logging_steps=10,
        save_steps=max(1, steps // 20),
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        validation_split_percentage=5,
        lora_dropout=0.1,
        disable_dropout="false",
        learning_rate=1e-4,
    )
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        found.watch(patch)
        if code := main_train(flags):
            raise SystemExit(code)
    return found


def _of_all_lengths(path: Path) -> None:
    """Make the answers of some rows longer, so that forests differ in size."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["chosen"] = " ".join([row["chosen"]] * (1 + number % 9))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PREFTREE_CACHE", str(Path(folder) / "cache"))
        found = soak(Path(folder), asked.steps)
    memory, seconds = found.growth()
    last = found.resident[-1] / 2**20
    good = memory < MEMORY and seconds < TIME
    print(
        f"{asked.steps} steps: resident memory {100 * (memory - 1):+.2f} % to {last:.0f} MiB, processor time of a step "
        f"{100 * (seconds - 1):+.1f} % to {1e3 * statistics.median(found.seconds[-asked.steps // 4 :]):.1f} ms: "
        f"{'flat' if good else 'NOT FLAT'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
