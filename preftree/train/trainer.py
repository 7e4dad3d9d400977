"""The trainer: transformers' Trainer with one change of unit, a dataloader batch is an optimizer step.

Trainer brings the loop, schedules, checkpoints, trackers and devices. What is ours is inside a step (`step`), what it
compares with (`reference`) and what it trains on (`dataset`). The command and scripts both use this class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftConfig, PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import EvalLoopOutput

from preftree.hardware.device import gemm_peak
from preftree.hardware.memory import freed_memory_kept, peak_memory
from preftree.io.atomic import atomic_files
from preftree.io.console import sayer
from preftree.model.cpu.linear import product_with
from preftree.publish.hub import check_writable, hub_repository
from preftree.train import given, setup
from preftree.train.attributes import TrlSurface
from preftree.train.config import DPOConfig
from preftree.train.dataset import PairDataset, StreamedPairs, collate, encode_dataset, named_set
from preftree.train.flops import ModelFlops
from preftree.train.guard import FiniteGuard, refuse_to_save
from preftree.train.health import HealthWatch, objective_facts
from preftree.train.live import LiveLine, LogRows, close_live_lines
from preftree.train.metrics import LiveMetrics, PairMeter, SpeedMeter
from preftree.train.order import prompt_order
from preftree.train.outputs import Predictions, save, write_card
from preftree.train.pair_log import PairLog
from preftree.train.precompute import precompute
from preftree.train.reference_models import MoveReference
from preftree.train.resumable import ResumableTrainer
from preftree.train.resume import identity_of
from preftree.train.step import StepResult
from preftree.train.stop import StopOnSignal

Prepared = PairDataset | StreamedPairs


class DPOTrainer(TrlSurface, ResumableTrainer):
    """Trains a causal language model on preference pairs, every prompt computed once.

    The arguments are those of TRL's trainer of the same name (docs/from-trl.md says what differs).

    Args:
        model: name or folder of a model, a model, or a PEFT model.
        ref_model: the reference model; by default the model before training.
        args: settings; by default those of `DPOConfig`.
        data_collator: refused, batches are forests.
        train_dataset: preference pairs: a `datasets.Dataset` or `IterableDataset`, a list of rows, or what
            `load_pairs` returns.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer; by default the model's own.
        compute_metrics: of the evaluation's logits, which cost a forward pass of padded sequences.
        callbacks: beside Trainer's own.
        optimizers: optimizer and schedule, by default those that `args` name.
        quantization_config: for a model that is loaded by its name.
        peft_config: of a new adapter.
        optimizer_cls_and_kwargs: class and arguments of the optimizer.
        preprocess_logits_for_metrics: of the logits that `compute_metrics` gets.
        console: where automatic choices are explained and the live line is shown; `Console(quiet=True)` for nowhere.

    Raises:
        PreftreeError: anything of the above that cannot be used, before anything is computed.
    """

    _tag_names = ("preftree", "dpo", "trl")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        console: Console | None = None,
    ) -> None:
        args = args or given.default_config(model)
        parts = given.Given(model, ref_model, quantization_config, peft_config, processing_class)
        given.check_arguments(parts, args, data_collator, given.Data(train_dataset, eval_dataset))
        given.check_hooks(callbacks, compute_metrics, preprocess_logits_for_metrics)
        self.console = console or given.console_for(args)
        self.say = sayer(self.console)
        for note in args.without_meaning():
            self.say(f"note       {note}")
        set_seed(args.seed)  # a new adapter is drawn at random
        self._started = False
        built = setup.build(parts, given.Data(train_dataset, eval_dataset), args, self.say, lambda: self._started)
        self.step, self.precision, self.hook = built.step, built.precision, built.hook
        self.scorer, self.reference, self.ranks = built.step.policy, built.step.reference, built.step.ranks
        self._encoding = built.encoding
        self._data_seed = int(built.args.seed if built.args.data_seed is None else built.args.data_seed)
        self._order = prompt_order(built.data.train, self._data_seed)
        self.since_log, self.speed, self.live_metrics = PairMeter(), SpeedMeter(), LiveMetrics()
        self.flops: ModelFlops | None = None
        self._tokens = 0
        self.pair_log = PairLog({}, self.ranks)  # of no pairs, until a run folder asks
        self.stopper = StopOnSignal(self.ranks, self.say)
        facts = objective_facts(built.step.objective, built.args, self.ranks.count)
        self.health = HealthWatch(self.say, facts, built.data, self.live_metrics.warnings)
        super().__init__(
            model=built.model,
            args=built.args,
            data_collator=collate,
            train_dataset=built.data.train,
            eval_dataset=built.data.evaluation,
            processing_class=built.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), built.hook, self.stopper, self.health],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs or (None if any(optimizers) else built.optimizer),
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model.add_model_tags(list(self._tag_names))
        self.ranks.copy_from_first(self._trained())
        if self.reference is not None and self.reference.model.moving and self.ref_model is not None:
            self.add_callback(MoveReference(self.model, self.ref_model, self.reference.forget))
        self._show_progress()
        self.guard = FiniteGuard(self.say, gradients=self.accelerator.scaler is None)
        self.identity = identity_of(self, built.weights)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's accelerator, told to leave the model as it is: gradients are added up here (see `ranks`)."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.scaler = self.precision.scaler(self._trained())

    def _show_progress(self) -> None:
        """On a terminal the live line in place of Trainer's progress bar; a notebook keeps its own."""
        notebook = DEFAULT_PROGRESS_CALLBACK is not ProgressCallback
        if self.console.quiet or notebook or not (self.console.is_terminal or self.args.disable_tqdm):
            return
        peak = gemm_peak(str(self.args.device), self.scorer.causal.dtype, ready=product_with)
        self.flops = ModelFlops.of(self.scorer.causal, peak)
        mfu = partial(self.flops.mfu, ranks=self.ranks.count)
        self.add_callback(LiveLine(self.console, self.live_metrics, str(self.args.device), mfu))
        self.add_callback(LogRows(self.console))
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)

    # --- Data ---

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of whole steps, in an order that does not depend on the number of ranks."""
        dataset: Prepared = self.train_dataset
        if isinstance(dataset, StreamedPairs):
            return self._whole_batches(dataset, self.args.train_batch_size)
        return self._epoch(dataset, self.args.dataloader_drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Every pair once, in batches that the ranks share.

        Args:
            eval_dataset: prepared pairs or rows; the name of one of several; None for the trainer's own.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = named_set(self.eval_dataset, eval_dataset)
        return self._whole_batches(self._prepared(eval_dataset or self.eval_dataset), self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The same for `predict`."""
        return self.get_eval_dataloader(test_dataset)

    def _prepared(self, data: Any) -> Prepared:
        return encode_dataset(data, self._encoding, "eval_dataset")

    def _epoch(self, dataset: PairDataset, drop_last: bool = False) -> DataLoader[Any]:
        sampler = self._order or self._get_train_sampler(dataset)
        return self._whole_batches(dataset, self.args.train_batch_size, sampler, drop_last)

    def _whole_batches(
        self, dataset: Prepared, batch_size: int, sampler: Sampler[int] | None = None, drop_last: bool = False
    ) -> DataLoader[Any]:
        """The same batches on every rank, each of which takes its share of them in the step."""
        args = self.args
        streamed = isinstance(dataset, StreamedPairs)
        workers = 0 if streamed else args.dataloader_num_workers  # several would each read the whole stream
        loader = DataLoader(
            dataset.encoded,  # type: ignore[arg-type]
            batch_size=batch_size * self.ranks.count,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )
        return prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=self._data_seed
        )

    # --- Training ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`; reference log-probs that must be there before the first step are computed first."""
        keep = self.args.max_memory is None
        with freed_memory_kept(keep) if self.args.device.type == "cpu" else nullcontext():
            self._precompute_reference()
            self._started = self._started or bool(resume_from_checkpoint)
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:  # a run that fails or is interrupted gives the terminal back and keeps what it has paid for
                if self.reference is not None:
                    self.reference.flush()
                close_live_lines(self.callback_handler.callbacks)

    def _precompute_reference(self) -> None:
        reference = self.reference
        if reference is None or self._started or (reference.model.lasting and not self.args.precompute_ref_log_probs):
            return
        sets = given.Data(self.train_dataset, self.eval_dataset).pair_sets()
        loaders = [self._epoch(each) if each is self.train_dataset else self.get_eval_dataloader(each) for each in sets]
        precompute(self.step, loaders, sum(len(each.pairs) for each in sets), self.console)
        reference.flush()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of the mean loss over the pairs of the step on all ranks; returns that mean."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers
        trained = self._trained()
        self.hook.before_forests(trained)
        with self._offloading():
            result = self.step.gradients(
                inputs["pairs"], self.accelerator.backward, self.hook.after_backward, self.model.zero_grad
            )
        self._add_up(result, trained, len(inputs["pairs"]))
        self.pair_log.add("train", inputs["pairs"], result.rewards)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        self._started = True
        self.live_metrics.step = result.meter
        finite = self._finite(result.loss, trained, inputs["pairs"])
        if finite:
            self.since_log.merge(result.meter)
        self._tokens += result.speed.unrolled_tokens
        for speed in (self.live_metrics.speed, self.speed):
            speed.merge(result.speed)
        return result.loss if finite else self._mean_loss()

    def _add_up(self, result: StepResult, trained: Sequence[nn.Parameter], pairs: int) -> None:
        """Gradients, loss and metrics of all ranks on every rank: the only exchange of a step on the device."""
        if self.ranks.count == 1:
            return
        gradients = []
        for parameter in trained:
            if parameter.grad is None:  # no pair of this step is here
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.ranks.add_up([*gradients, result.loss, result.meter.total])
        result.meter.pairs = pairs

    def _offloading(self) -> AbstractContextManager[object]:
        if not self.args.activation_offloading or self.args.device.type == "cpu":
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=True)

    # --- Evaluation ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics of the evaluation set, of rows of any form that the trainer takes, or of several by name."""
        given.refuse_streams(self.args, eval_dataset)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._prepared(rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and reward metrics over all pairs of `dataloader`, each pair with the same weight.

        Logits as well where `compute_metrics` or `predict` wants them, of all of them at once.
        """
        training = self.model.training
        self.model.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()
        meter, pairs = PairMeter.on(self.args.device), 0
        only_loss = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        predictions = None if only_loss else Predictions(self)
        for batch in dataloader:
            result = self.step.evaluate(batch["pairs"])
            meter.merge(result.meter)
            self.pair_log.add(metric_key_prefix, batch["pairs"], result.rewards)
            pairs += len(batch["pairs"])
            if predictions is not None:
                predictions.add(batch["pairs"])
        if self.reference is not None:
            self.reference.flush()  # later runs find what the evaluation paid for
        self.ranks.add_up([meter.total])
        meter.pairs = pairs
        means = meter.means()
        logits, ids = predictions.arrays() if predictions is not None else ((), None)
        if predictions is not None and self.compute_metrics is not None:
            means |= self.compute_metrics(EvalPrediction(logits, ids))
        self.model.train(training)
        means["num_tokens"] = self._tokens  # trained on so far, as in TRL
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(predictions=logits, label_ids=ids, metrics=metrics, num_samples=pairs)

    # --- Logs and files ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair metrics since the last log line to a training log line."""
        if "train_loss" in logs:  # over the whole run, not since it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if ("loss" in logs or "train_loss" in logs) and self.since_log.pairs:
            means = self.since_log.means()
            means.pop("loss")  # Trainer's own: the mean over steps, the same for steps of one size
            logs.update(means)
            logs["num_tokens"] = self._tokens
            logs.update(self.speed.rates())
            if self.flops is not None:
                logs["mfu"] = self.flops.mfu(self.speed, self.ranks.count)
            logs["peak_memory_gib"] = peak_memory(str(self.args.device)) / 2**30
            if self.ranks.count > 1:
                logs["rank_imbalance"] = self.speed.imbalance(self.ranks.count)
            self.since_log, self.speed = PairMeter(), SpeedMeter()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Adapter or model, and tokenizer, in their standard formats, without Trainer's pickle of the arguments."""
        if not self.args.should_save:
            return
        target = Path(output_dir or self.args.output_dir or ".")
        refuse_to_save(self._trained(), str(target))
        with atomic_files(target) as folder:
            save(self.model, folder, state_dict)
            if isinstance(self.processing_class, PreTrainedTokenizerBase):
                self.processing_class.save_pretrained(str(folder))

    def init_hf_repo(self, token: str | None = None, **options: Any) -> None:
        """Make the repository on the hub; RunError says why that cannot be done, offline at once."""
        if self.is_world_process_zero():
            private = options.get("private")
            check_writable(
                hub_repository(self.args.hub_model_id, Path(self.args.output_dir or ".")),
                private=bool(self.args.hub_private_repo if private is None else private),
                token=token or self.args.hub_token,
                flag="`push_to_hub`",
            )
        super().init_hf_repo(token, **options)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        **others: Any,
    ) -> None:
        """Write README.md, the model card of the hub, into the output folder."""
        if self.is_world_process_zero():
            given = [tags] if isinstance(tags, str) else list(tags or ())
            write_card(self, model_name, dataset_name, [*given, *self._tag_names])
