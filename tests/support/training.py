"""Pairs, a tiny model with LoRA, and a trainer on them: what tests of single steps start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from preftree.data.encode import EncodedPair
from preftree.model.lora import add_lora
from preftree.train.config import DPOConfig
from preftree.train.dataset import PairDataset
from preftree.train.objective import Objective
from preftree.train.reference import Reference
from preftree.train.reference_models import AdapterOff
from preftree.train.trainer import DPOTrainer
from tests.support import tiny

SYSTEM = tuple(range(3, 15))  # long enough to be shared

Step = tuple[float, dict[str, Tensor]]  # loss and gradients


def pair(row: int, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> EncodedPair:
    return EncodedPair(tuple(prompt), tuple(chosen), tuple(rejected), row, "test")


#: Equal prompts, a shared beginning, a prompt that begins another one, one-token answers.
PAIRS = [
    pair(0, (*SYSTEM, 20, 21), (30, 31, 32, 2), (40, 2)),
    pair(1, (*SYSTEM, 20, 21), (33, 2), (41, 42, 43, 44, 45, 2)),
    pair(2, (*SYSTEM, 22), (34, 35, 2), (46,)),
    pair(3, (50, 51, 52), (36,), (47, 48, 2)),
    pair(4, (50, 51, 52, 53, 54), (37, 38, 2), (49, 2)),
    pair(5, SYSTEM, (39, 60, 61, 2), (62, 63, 64, 2)),
]


def make_model(*, dtype: torch.dtype = torch.float64, trained: bool = True, dropout: float = 0.0) -> PeftModel:
    """A tiny Llama with LoRA; `trained` gives it an adapter that is not the reference."""
    base = tiny.llama(num_hidden_layers=2).to(dtype)
    if trained:
        return tiny.with_lora(base, dropout=dropout)
    torch.manual_seed(1)
    model = add_lora(base, rank=4, alpha=8, dropout=dropout)
    return model.to(dtype)  # type: ignore[no-any-return]


def make_trainer(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    pairs: Sequence[EncodedPair] = PAIRS,
    *,
    evaluated: Sequence[EncodedPair] = (),
    objective: Objective | None = None,
    by_prompt: bool = False,
    **args: Any,
) -> DPOTrainer:
    """A trainer on pairs; with an adapter the reference is the model without it, so that a trained one says something.

    Args:
        objective: in place of what `args` ask for.
        args: of `DPOConfig`, and `budget` for its tokens_per_forest.
    """
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "disable_dropout": False,
        "reference_cache": False,
        "tokens_per_forest": args.pop("budget", 64),
        "seed": 3,
    }
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir=str(folder), **{**defaults, **args}),
        train_dataset=PairDataset(pairs, by_prompt),
        eval_dataset=PairDataset(evaluated) if evaluated else None,
        processing_class=tiny.word_tokenizer(),
        console=Console(quiet=True),
    )
    asked = args.get("attention", "auto")
    assert trainer.scorer.name in ("native", "tiles") if asked == "auto" else trainer.scorer.name == asked
    if isinstance(model, PeftModel):
        trainer.reference = trainer.step.reference = Reference(AdapterOff(trainer.scorer))
    if objective is not None:
        trainer.step.objective = objective
    return trainer


def one_step(trainer: DPOTrainer, pairs: Sequence[EncodedPair]) -> Step:
    """Loss and gradients of one optimizer step on `pairs`."""
    trainer.model.zero_grad()
    loss = float(trainer.training_step(trainer.model, {"pairs": list(pairs)}))
    grads = {name: p.grad.clone() for name, p in tiny.trained(trainer.model).items() if p.grad is not None}
    assert grads.keys() == tiny.trained(trainer.model).keys()
    return loss, grads
