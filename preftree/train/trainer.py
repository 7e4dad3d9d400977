"""transformers' Trainer with one change of unit: a dataloader batch is an optimizer step.

Trainer brings the loop, schedules, checkpoints, trackers and devices. What is ours is inside a step: the
batch of pairs is cut into forests, each forest's loss is divided by the number of pairs of the *step* and
its gradient added up, so that no way of cutting changes the objective.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from preftree.forest import Pair, forests_of_pairs
from preftree.train.metrics import PairMeter, Pulse, SpeedMeter
from preftree.train.reference import Reference
from preftree.train.step import Objective, forest_losses


class PairDataset(Dataset[Pair]):
    """Encoded pairs in memory, as torch's samplers want them."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def collate(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """A batch stays a list of pairs; forests are planted in the step, where the budget is known."""
    return {"pairs": pairs}


class PreferenceTrainer(Trainer):
    """Trains a PEFT model on pairs.

    Args:
        model: PEFT model, attached (`score.attach`).
        args: training arguments as the user gave them; batch size × accumulation become one batch.
        train_pairs, eval_pairs: encoded pairs.
        reference: log-probs of the model before training.
        objective: loss and constants.
        budget: most tokens of a forest.
        tokenizer: saved beside the adapter.
        pulse: filled in as steps go by, for a live line.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        train_pairs: Sequence[Pair],
        eval_pairs: Sequence[Pair],
        reference: Reference,
        objective: Objective,
        budget: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pulse: Pulse | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.reference, self.objective, self.budget = reference, objective, budget
        self.since_log = PairMeter()
        self.speed = SpeedMeter()
        self.pulse = pulse or Pulse()
        super().__init__(
            model=model,
            args=_one_batch_a_step(args),
            data_collator=collate,
            train_dataset=PairDataset(train_pairs),
            eval_dataset=PairDataset(eval_pairs) if eval_pairs else None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of the mean loss over the pairs of the step; returns that mean."""
        model.train()
        pairs: list[Pair] = inputs["pairs"]
        self.pulse.step = PairMeter()
        total = torch.zeros((), device=self.args.device)
        for forest in forests_of_pairs(pairs, self.budget, self.args.device):
            losses_P, logps = forest_losses(self.model, forest, self.reference, self.objective)
            share = losses_P.sum() / len(pairs)
            self.accelerator.backward(share)
            total += share.detach().to(total.dtype)
            for meter in (self.pulse.step, self.since_log):
                meter.add(logps, losses_P, self.objective.beta)
            for speed in (self.pulse.speed, self.speed):
                speed.add(forest)
        return total

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and reward metrics over all pairs of `dataloader`, each pair with the same weight."""
        self.model.eval()
        meter = PairMeter()
        for batch in dataloader:
            for forest in forests_of_pairs(batch["pairs"], self.budget, self.args.device):
                losses_P, logps = forest_losses(self.model, forest, self.reference, self.objective)
                meter.add(logps, losses_P, self.objective.beta)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.means().items()}
        return EvalLoopOutput(predictions=(), label_ids=None, metrics=metrics, num_samples=meter.pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair metrics since the last log line to a training log line."""
        if "loss" in logs and self.since_log.pairs:
            means = self.since_log.means()
            means.pop("loss")  # Trainer's own: the mean over steps, the same for steps of one size
            logs.update(means)
            logs.update(self.speed.rates())
            self.since_log, self.speed = PairMeter(), SpeedMeter()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Adapter and tokenizer in their standard formats, without Trainer's pickle of the arguments."""
        target = Path(output_dir or self.args.output_dir or ".")
        os.makedirs(target, exist_ok=True)
        # Embeddings are never trained here. Left to itself, PEFT would ask the hub whether they were resized.
        self.model.save_pretrained(str(target), state_dict=state_dict, save_embedding_layers=False)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            self.processing_class.save_pretrained(str(target))


def _one_batch_a_step(args: TrainingArguments) -> TrainingArguments:
    """A copy in which a batch holds the pairs of a whole step and precision is left to the model's dtype."""
    args = copy.copy(args)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.bf16 = args.fp16 = False  # autocast would wrap a forward that is never called
    args.label_names = []
    args.remove_unused_columns = False
    return args
