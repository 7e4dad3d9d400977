"""One side of `train_vs_trl.py` in its own process: a training run by preftree or by TRL, and when its steps ended."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from side_by_side import PeakMemory
from transformers import TrainerCallback


@dataclass
class Clock(TrainerCallback):
    """When a run began, when its first step began, and when each step ended, in seconds of `time.perf_counter`.

    Here start-up checks are over when `trained` is set, and what follows is the reference pass; TRL's is within its
    constructor.
    """

    began: float = field(default_factory=time.perf_counter)
    trained: float | None = None
    first: float | None = None
    ends: list[float] = field(default_factory=list)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.first is None:
            self.first = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> dict[str, float]:
        """Seconds before the first step, of the first step, and of all later steps together."""
        assert self.first is not None
        return {
            "before": self.first - (self.began if self.trained is None else self.trained),
            "first": self.ends[0] - self.first,
            "later": self.ends[-1] - self.ends[0],
        }


def run_side(args: argparse.Namespace) -> dict[str, Any]:
    """Train as `args` say and return what was measured.

    The steady state is what comes after the first step, which has the first pairs of the file on both sides. Where the
    reference is computed before it (full fine-tuning here, `precompute_ref_log_probs` at TRL), that pass belongs to
    every step: what came before the first step is spread evenly over all of them.
    """
    import torch
    from transformers import set_seed

    from preftree.data.encode import encode_pairs
    from preftree.data.sources import load_pairs
    from preftree.hardware.device import gemm_peak
    from preftree.hardware.precision import cpu_bf16_instructions
    from preftree.model.cpu.linear import product_with
    from preftree.model.determinism import remove_randomness
    from preftree.model.load import load_model, load_tokenizer, resolve
    from preftree.model.lora import add_lora
    from preftree.train.flops import ModelFlops

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(args.dtype)
    if dtype is None:
        fast = args.device != "cpu" or cpu_bf16_instructions()
        dtype = torch.bfloat16 if fast else torch.float32
    source = resolve(args.model)
    tokenizer = load_tokenizer(source)
    pairs, _ = encode_pairs(
        load_pairs(args.data), tokenizer, max_length=args.max_length, max_prompt_length=args.max_prompt_length
    )
    pairs = pairs[:: max(1, len(pairs) // args.pairs)][: args.pairs]
    model = load_model(source, dtype).to(args.device)
    peak = gemm_peak(args.device, dtype, seconds=1.0, ready=product_with)
    set_seed(0)
    targets = None if args.all_linear else ["q_proj", "k_proj", "v_proj"]
    peft = model if args.full else add_lora(model, rank=args.rank, alpha=args.rank, target_modules=targets)
    remove_randomness(peft)
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        clock = Clock()
        run = _run_preftree if args.child == "preftree" else _run_trl
        losses, precomputed = run(args, _training(args, folder), peft, tokenizer, pairs, clock)
        whole = time.perf_counter() - clock.began
    seconds, count = clock.seconds(), len(pairs) * args.epochs
    later = count - args.step
    steady = seconds["later"] / later + (seconds["before"] / count if precomputed else 0.0)
    useful = ModelFlops.of(model, peak).useful(_counts(args, pairs, precomputed))
    return {
        "pairs_per_second": 1 / steady,
        "whole_pairs_per_second": count / whole,
        "seconds": {**seconds, "whole": whole},
        "peak_gib": memory.peak / 2**30,
        "losses": losses,
        "gemm_peak_gflops": peak / 1e9,
        "mfu": useful / (steady * later) / peak,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _run_preftree(
    args: argparse.Namespace, training: dict[str, Any], peft: Any, tokenizer: Any, pairs: list[Any], clock: Clock
) -> tuple[list[float], bool]:
    from rich.console import Console

    from preftree.train.config import DPOConfig
    from preftree.train.trainer import DPOTrainer

    config = DPOConfig(**training, per_device_train_batch_size=args.step, reference_cache=False)
    console = Console(quiet=True)
    trainer = DPOTrainer(
        peft, args=config, train_dataset=pairs, processing_class=tokenizer, console=console, callbacks=[clock]
    )
    clock.trained = time.perf_counter()
    trainer.train()
    return _losses(trainer), args.full


def _run_trl(
    args: argparse.Namespace, training: dict[str, Any], peft: Any, tokenizer: Any, pairs: list[Any], clock: Clock
) -> tuple[list[float], bool]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """Takes token ids as they are: both sides train on the same ones, and tokenizing is not timed."""

        def _prepare_dataset(self, dataset: Any, *others: Any, **more: Any) -> Any:
            return dataset

    batch = args.batch
    config = DPOConfig(
        **training,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=args.step // batch,
        gradient_checkpointing=False,
        max_length=None,
        precompute_ref_log_probs=args.epochs > 1 or args.trl_precompute,
        bf16="bfloat16" in str(peft.dtype),
    )
    rows = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
        for p in pairs
    ]
    # TRL would load its reference by the model's name, which the bundled model has none of on a hub.
    second = copy.deepcopy(peft) if args.full and not config.precompute_ref_log_probs else None
    trainer = Tokenized(
        model=peft,
        ref_model=second,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return _losses(trainer), config.precompute_ref_log_probs


def _training(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",  # so that it is known what the first step has computed
        "use_cpu": args.device == "cpu",
        "seed": 0,
    }


def _losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def _counts(args: argparse.Namespace, pairs: list[Any], precomputed: bool) -> Any:
    """The counts of a run's steady state without any sharing between pairs: each pair's tree, the reference once.

    Args:
        precomputed: the steps after the first have their share of one reference pass over all pairs, else their own.
    """
    from preftree.forest import pair_size
    from preftree.train.metrics import SpeedMeter

    def tokens(some: list[Any]) -> tuple[int, int]:
        tree = sum(map(pair_size, some))
        return tree, tree - sum(len(p.prompt_ids) for p in some)

    (tree, scored), (later_tree, later_scored) = tokens(pairs), tokens(pairs[args.step :])
    part = 1 - args.step / (len(pairs) * args.epochs)
    return SpeedMeter(
        tree_tokens=later_tree + (args.epochs - 1) * tree,
        scored_tokens=later_scored + (args.epochs - 1) * scored,
        reference_tokens=round(part * tree) if precomputed else later_tree,
        reference_scored=round(part * scored) if precomputed else later_scored,
    )
