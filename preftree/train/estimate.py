"""`preftree train --dry-run`: how long a run will take and how much memory, from a few of its own steps.

The steps are the first ones of the run, in its order, through the same loop, in a temporary folder. Their seconds per
FLOP (`ModelFlops`) times the FLOPs of all steps, epochs and evaluations is the time. For the memory the steps of the
first epoch that need most are computed after them, in a heap that smaller steps have cut up, as the run's will be.
Computed first, they would leave a gap that everything else fits into, and predictions were up to 13 % too low.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.forest import Forest, Pair
from preftree.hardware.memory import peak_memory
from preftree.io.console import Say
from preftree.io.progress import clock
from preftree.train.flops import ModelFlops
from preftree.train.metrics import SpeedMeter
from preftree.train.trainer import DPOTrainer

#: Steps that are timed, after one that warms up.
TIMED_STEPS = 5
#: Steps of the first epoch whose forests are laid out to be counted; the others are taken to be like them.
_COUNTED = 500
#: A share of the time, or of the tokens, from which a setting is worth naming.
_WORTH = 0.15


@dataclass(frozen=True)
class Planned:
    """What a run is asked for.

    Args:
        steps: in all.
        evaluations: of the held-out pairs.
    """

    steps: int
    evaluations: int

    @classmethod
    def of(cls, train: Any, pairs: int, ranks: int, held_out: int) -> Planned:
        """As the training settings ask for."""
        per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
        per_epoch = math.ceil(pairs / per_step)
        steps = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * per_epoch)
        if not held_out:
            return cls(steps, 0)
        if train.eval_strategy == "steps":
            every = train.eval_steps or train.logging_steps
            every = math.ceil(steps * every) if every < 1 else every
            return cls(steps, int(steps // every))
        return cls(steps, math.ceil(steps / per_epoch) if train.eval_strategy == "epoch" else 1)


@dataclass(frozen=True)
class Estimate:
    """What was found out; seconds, bytes and tokens.

    Args:
        steps_seconds, evaluation_seconds: predicted.
        memory: the peak.
        largest: tokens of the largest forest.
        largest_pair, usual_pair: tokens of the largest pair, and of the one at 99 %.
        saved: share of the tokens of single sequences that trees save.
        cached: share of the reference's answers that are known from earlier runs.
        checkpointing: are activations recomputed?
    """

    planned: Planned
    pairs: int
    steps_seconds: float
    evaluation_seconds: float
    memory: int
    largest: int
    largest_pair: int
    usual_pair: int
    saved: float
    cached: float
    checkpointing: bool
    dtype: str
    device: str

    @property
    def seconds(self) -> float:
        return self.steps_seconds + self.evaluation_seconds

    def lines(self) -> list[str]:
        """What is said."""
        per_step = self.steps_seconds / max(self.planned.steps, 1)
        evaluations = f", of which {clock(self.evaluation_seconds)} evaluations" if self.evaluation_seconds else ""
        return [
            f"pairs      {self.pairs}; trees save {100 * self.saved:.0f} % of the tokens of single sequences",
            f"time       {clock(self.seconds)} for {self.planned.steps} steps of {per_step:.2f} s{evaluations}; "
            "loading and answers to fixed prompts not counted",
            f"memory     {self.memory / 2**30:.2f} GiB at most; the largest forest has {self.largest} tokens",
            *(f"{'change' if number == 0 else '':10} {text}" for number, text in enumerate(self.advice())),
        ]

    def advice(self) -> list[str]:
        """Settings that would make the run faster or smaller."""
        found = []
        if self.dtype == "float32" and self.device != "cpu":
            found.append("--dtype bfloat16 halves memory and is faster on this device")
        if self.checkpointing:
            found.append("activations are recomputed, a quarter of the time: more memory or shorter pairs avoid it")
        if self.cached < 0.5:
            found.append(
                "the reference takes up to a third of the first epoch; later runs on these pairs read it from disk"
            )
        if self.evaluation_seconds > _WORTH * self.seconds:
            share = 100 * self.evaluation_seconds / self.seconds
            found.append(f"evaluations take {share:.0f} % of the time: a larger --eval_steps, or --max_eval_samples")
        if self.usual_pair < (1 - _WORTH) * self.largest_pair:
            found.append(
                f"99 % of the pairs have at most {self.usual_pair} tokens and the largest {self.largest_pair}: a lower "
                "--max_length makes the largest forest smaller"
            )
        if self.largest > max(2 * self.largest_pair, 512):
            half = max(self.largest // 2, self.largest_pair)
            found.append(f"--tokens_per_forest {half} needs less memory, at some speed")
        return found


class _StepTimer(TrainerCallback):
    """Seconds and counts of each step of a trainer."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        self.steps: list[tuple[float, SpeedMeter]] = []
        self._started, self._counts = now(), trainer.live_metrics.speed.counts()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._started, self._counts = now(), self.trainer.live_metrics.speed.counts()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        counts = self.trainer.live_metrics.speed.counts()
        new = SpeedMeter(*(after - before for after, before in zip(counts, self._counts, strict=True)))
        self.steps.append((now() - self._started, new))


def now() -> float:
    """Seconds of a clock that only goes forward."""
    return time.perf_counter()


def measure(trainer: DPOTrainer, planned: Planned, say: Say) -> Estimate:
    """Train a few steps, with `max_steps` set to that many, and predict.

    Args:
        trainer: of pairs in memory; what it writes goes to a folder that is deleted.
    """
    flops = ModelFlops.of(trainer.scorer.causal, 1.0)
    pairs: list[Pair] = list(trainer.train_dataset.pairs)
    held_out: list[Pair] = list(trainer.eval_dataset.pairs) if trainer.eval_dataset is not None else []
    loader = trainer.get_train_dataloader()
    batches = [batch["pairs"] for batch in itertools.islice(loader, _COUNTED)]
    forests = [trainer.step.forests(batch) for batch in batches]
    say(f"trial      {TIMED_STEPS + 1} steps, then those that need the most memory …")
    timer = _StepTimer(trainer)
    trainer.add_callback(timer)
    trainer.train()
    for number in _extremes(forests):
        trainer.training_step(trainer.model, {"pairs": batches[number]})
        trainer.model.zero_grad()
    if planned.evaluations:
        _evaluate_largest(trainer)
    timed = timer.steps[1:] or timer.steps
    measured = SpeedMeter()
    for _, counts in timed:
        measured.merge(counts)
    per_flop = sum(seconds for seconds, _ in timed) / max(flops.useful(measured), 1)
    reference = measured.reference_tokens / max(measured.tree_tokens, 1)
    counts = _counted(forests)
    epoch = _scaled(counts, len(loader) / len(batches))
    training = _all_steps(epoch, planned.steps / len(loader), reference)
    one = _counted([trainer.step.forests(held_out)]) if held_out else SpeedMeter()
    forward = replace(one, tree_tokens=0, scored_tokens=0, reference_tokens=one.tree_tokens,
                      reference_scored=one.scored_tokens)  # fmt: skip
    evaluating = flops.useful(forward) * (planned.evaluations + (min(reference, 1.0) if planned.evaluations else 0))
    sizes = sorted(pair.size if hasattr(pair, "size") else 0 for pair in pairs)
    return Estimate(
        planned=planned,
        pairs=len(pairs),
        steps_seconds=per_flop * flops.useful(training),
        evaluation_seconds=per_flop * evaluating,
        memory=peak_memory(str(trainer.args.device)),
        largest=max(len(forest) for row in forests for forest in row),
        largest_pair=sizes[-1],
        usual_pair=sizes[int(0.99 * (len(sizes) - 1))],
        saved=counts.saved_share,
        cached=1 - min(reference, 1.0),
        checkpointing=bool(trainer.args.gradient_checkpointing),
        dtype=str(trainer.scorer.causal.dtype).removeprefix("torch."),
        device=trainer.args.device.type,
    )


def _extremes(rows: Sequence[Sequence[Forest]]) -> list[int]:
    """The step with the largest forest, and the one whose forest has the most scored tokens: as many rows of logits."""
    tokens = [max(map(len, forests)) for forests in rows]
    scored = [max(len(forest.target_S) for forest in forests) for forests in rows]
    return list(dict.fromkeys((tokens.index(max(tokens)), scored.index(max(scored)))))


def _evaluate_largest(trainer: DPOTrainer) -> None:
    """Evaluation may take larger batches than training."""
    batches = (batch["pairs"] for batch in itertools.islice(trainer.get_eval_dataloader(), _COUNTED))
    trainer.step.evaluate(max(batches, key=lambda pairs: max(map(len, trainer.step.forests(pairs)))))


def _counted(rows: Sequence[Sequence[Forest]]) -> SpeedMeter:
    meter = SpeedMeter()
    for forest in itertools.chain.from_iterable(rows):
        meter.add(forest)
    return meter


def _scaled(meter: SpeedMeter, factor: float) -> SpeedMeter:
    return SpeedMeter(*(round(count * factor) for count in meter.counts()))


def _all_steps(epoch: SpeedMeter, epochs: float, reference: float) -> SpeedMeter:
    """Counts of a run: the reference is computed in the first epoch, as far as it is not known."""
    total, first = _scaled(epoch, epochs), min(epochs, 1.0) * reference
    return replace(
        total,
        reference_tokens=round(first * epoch.tree_tokens),
        reference_scored=round(first * epoch.scored_tokens),
    )
