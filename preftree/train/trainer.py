"""transformers' Trainer with one change of unit: a dataloader batch is an optimizer step.

Trainer brings the loop, schedules, checkpoints, trackers and devices. What is ours is inside a step: the
batch of pairs is sharded over the ranks and cut into forests, each forest's loss is divided by the number of
pairs of the *step* on all ranks and its gradient added up, so that no way of cutting changes the objective.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from preftree.distributed.ranks import Ranks
from preftree.forest import Forest, Pair, Shape, forests_of_pairs, idle_forest, shares_of_pairs
from preftree.model.score import Scorer, leaf_logprobs
from preftree.train.flops import ModelFlops
from preftree.train.hpu import StepHook
from preftree.train.metrics import LiveMetrics, PairMeter, SpeedMeter
from preftree.train.order import PromptOrder
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


@dataclass(frozen=True)
class StepPlan:
    """One rank's part of a step: its forests, dummy passes that keep collectives in step, and all ranks' counts."""

    forests: list[Forest]
    dummy_passes: int
    speed: SpeedMeter


class PreferenceTrainer(Trainer):
    """Trains a PEFT model on pairs.

    Args:
        scorer: of the PEFT model to train.
        args: training arguments as the user gave them; batch size × accumulation become one batch.
        train_pairs, eval_pairs: encoded pairs.
        reference: log-probs of the model before training.
        objective: loss and constants.
        budget: most tokens of a forest.
        shape: pad all forests to this one; None pads none.
        ranks: the processes that train together; by default those of the process group.
        tokenizer: saved beside the adapter.
        live_metrics: updated at each step, for a live line.
        hook: what a step adds for its device.
        optimizer: class and arguments, where it is not the one that `args` name.
        flops: the FLOPs that MFU is computed from; without them it is not logged.
        by_prompt: keep the pairs of a prompt together (see `order`).
    """

    def __init__(
        self,
        scorer: Scorer,
        args: TrainingArguments,
        *,
        train_pairs: Sequence[Pair],
        eval_pairs: Sequence[Pair],
        reference: Reference,
        objective: Objective,
        budget: int,
        shape: Shape | None = None,
        ranks: Ranks | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        live_metrics: LiveMetrics | None = None,
        flops: ModelFlops | None = None,
        callbacks: list[TrainerCallback] | None = None,
        hook: StepHook | None = None,
        optimizer: tuple[Any, dict[str, Any]] | None = None,
        by_prompt: bool = False,
    ) -> None:
        self.scorer = scorer
        self.reference, self.objective, self.budget, self.shape = reference, objective, budget, shape
        self.ranks = ranks or reference.ranks
        self.since_log = PairMeter()
        self.speed = SpeedMeter()
        self.live_metrics = live_metrics or LiveMetrics()
        self.hook = hook or StepHook()
        self.flops = flops
        self._order = PromptOrder(train_pairs, _data_seed(args)) if by_prompt else None
        super().__init__(
            model=scorer.model,
            args=_one_batch_a_step(args),
            data_collator=collate,
            train_dataset=PairDataset(train_pairs),
            eval_dataset=PairDataset(eval_pairs) if eval_pairs else None,
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), self.hook],
            optimizer_cls_and_kwargs=optimizer,
        )
        self.ranks.copy_from_first(self._trained())

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's accelerator, told to leave the model as it is: gradients are added up here (see `ranks`)."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of whole steps, in an order that does not depend on the number of ranks."""
        return self._whole_batches(
            self.train_dataset,
            self.args.train_batch_size,
            self._order or self._get_train_sampler(),
            self.args.dataloader_drop_last,
        )

    def get_eval_dataloader(self, eval_dataset: Dataset[Pair] | None = None) -> DataLoader[Any]:
        """Every pair once, in batches that the ranks share."""
        return self._whole_batches(eval_dataset or self.eval_dataset, self.args.eval_batch_size)

    def _whole_batches(
        self, dataset: Any, batch_size: int, sampler: Sampler[int] | None = None, drop_last: bool = False
    ) -> DataLoader[Any]:
        """The same batches on every rank, each of which takes its share of them in the step."""
        args = self.args
        loader = DataLoader(
            dataset,
            batch_size=batch_size * self.ranks.count,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=_data_seed(args)
        )

    def plan(self, pairs: Sequence[Pair]) -> StepPlan:
        """This rank's forests of a step, with their reference log-probs known. All ranks call it together."""
        share = shares_of_pairs(pairs, self.ranks.count)[self.ranks.index]
        forests = forests_of_pairs(share, self.budget, self.args.device, self.shape)
        mine = SpeedMeter()
        for forest in forests:
            mine.add(forest)
        for forest in self.reference.fill(forests):
            mine.add_reference(forest)
        counts = self.ranks.gather(mine.counts())
        most = max(SpeedMeter(*row).forests for row in counts) if self.ranks.lockstep else 0
        return StepPlan(forests, max(0, most - len(forests)), SpeedMeter.of_ranks(counts))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of the mean loss over the pairs of the step on all ranks; returns that mean."""
        model.train()
        pairs: list[Pair] = inputs["pairs"]
        plan = self.plan(pairs)
        meter = PairMeter.on(self.args.device)
        total = torch.zeros((), device=self.args.device)
        self.hook.before_forests(self._trained())
        for forest in plan.forests:
            losses_P, logps = forest_losses(self.scorer, forest, self.reference, self.objective)
            share = losses_P.sum() / len(pairs)
            self.accelerator.backward(share)
            self.hook.after_backward()
            total += share.detach().to(total.dtype)
            meter.add(logps, losses_P, self.objective.beta)
        for _ in range(plan.dummy_passes):
            self.accelerator.backward(0 * leaf_logprobs(self.scorer, idle_forest(self.args.device)).token_S.sum())
        self._add_up(total, meter, pairs)
        self.live_metrics.step = meter
        self.since_log.merge(meter)
        for speed in (self.live_metrics.speed, self.speed):
            speed.merge(plan.speed)
        return total

    def _add_up(self, total: Tensor, meter: PairMeter, pairs: Sequence[Pair]) -> None:
        """Gradients, loss and metrics of all ranks on every rank: the only exchange of a step on the device."""
        if self.ranks.count == 1:
            return
        gradients = []
        for parameter in self._trained():
            if parameter.grad is None:  # no pair of this step is here
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.ranks.add_up([*gradients, total, meter.total])
        meter.pairs = len(pairs)

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
        meter = PairMeter.on(self.args.device)
        pairs = 0
        for batch in dataloader:
            plan = self.plan(batch["pairs"])
            pairs += len(batch["pairs"])
            for forest in plan.forests:
                losses_P, logps = forest_losses(self.scorer, forest, self.reference, self.objective)
                meter.add(logps, losses_P, self.objective.beta)
            for _ in range(plan.dummy_passes):
                leaf_logprobs(self.scorer, idle_forest(self.args.device))
        self.ranks.add_up([meter.total])
        meter.pairs = pairs
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.means().items()}
        return EvalLoopOutput(predictions=(), label_ids=None, metrics=metrics, num_samples=meter.pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair metrics since the last log line to a training log line."""
        if "loss" in logs and self.since_log.pairs:
            means = self.since_log.means()
            means.pop("loss")  # Trainer's own: the mean over steps, the same for steps of one size
            logs.update(means)
            logs.update(self.speed.rates())
            if self.flops is not None:
                logs["mfu"] = self.flops.mfu(self.speed, self.ranks.count)
            if self.ranks.count > 1:
                logs["rank_imbalance"] = self.speed.imbalance(self.ranks.count)
            self.since_log, self.speed = PairMeter(), SpeedMeter()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Adapter and tokenizer in their standard formats, without Trainer's pickle of the arguments."""
        if not self.args.should_save:
            return
        target = Path(output_dir or self.args.output_dir or ".")
        os.makedirs(target, exist_ok=True)
        # Embeddings are never trained here. Left to itself, PEFT would ask the hub whether they were resized.
        self.model.save_pretrained(str(target), state_dict=state_dict, save_embedding_layers=False)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            self.processing_class.save_pretrained(str(target))


def _data_seed(args: TrainingArguments) -> int:
    return int(args.data_seed if args.data_seed is not None else args.seed)


def _one_batch_a_step(args: TrainingArguments) -> TrainingArguments:
    """A copy in which a batch holds the pairs of a whole step and precision is left to the model's dtype."""
    args = copy.copy(args)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.bf16 = args.fp16 = False  # autocast would wrap a forward that is never called
    args._n_gpu = min(1, args._n_gpu)  # several GPUs are several ranks, never DataParallel in one process
    if args.device.type != "cpu":
        args.logging_nan_inf_filter = False  # reads the loss in every step, so the host waits for the device
    args.label_names = []
    args.remove_unused_columns = False
    return args
