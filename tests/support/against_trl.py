"""The DPO script of TRL's users, run with either library's trainer: only the import differs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support import tiny

STEPS, BATCH, BETA = 20, 3, 0.2
TEMPLATE = (
    "{% for m in messages %}{{ '<turn> ' + m['content'] + ' <eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> ' }}{% endif %}"
)
#: Every loss that both have, and what else it needs.
LOSSES: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            "sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
            "apo_down", "discopop", "sft", "sigmoid_norm",
        )
    },
    "exo_pair": {"label_smoothing": 1e-3},
    "sigmoid+bco_pair+sft": {"loss_weights": [0.8, 0.2, 1.0]},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained, on what, with which loss.

    Args:
        loss: names joined by +.
        lora: else full fine-tuning.
        conversational: else texts.
        more: further fields of DPOConfig.
    """

    loss: str
    lora: bool = True
    conversational: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        how = "LoRA" if self.lora else "full"
        return f"{self.loss}, {how}, {'conversational' if self.conversational else 'standard'}"


@dataclass(frozen=True, eq=False)
class Run:
    """What came out of a run: the log and the trained weights."""

    history: list[dict[str, float]]
    weights: dict[str, Tensor]


def rows(count: int, conversational: bool) -> list[dict[str, Any]]:
    """Texts of known words; prompts repeat and share a beginning, answers have 1 to 7 words."""
    random = torch.Generator().manual_seed(7)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (1,), generator=random))
        ids = torch.randint(10, tiny.VOCABULARY, (length,), generator=random).tolist()
        return "".join(f" w{i}" for i in ids)

    system = words(10, 10)
    prompts = [words(1, 6), *(system + words(1, 5) for _ in range(4))]
    texts = [
        {"prompt": prompts[i % len(prompts)], "chosen": words(1, 7), "rejected": words(1, 7)} for i in range(count)
    ]
    if not conversational:
        return texts
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: [{"role": roles[name], "content": text}] for name, text in row.items()} for row in texts]


def run(library: Any, case: Case, folder: Path, steps: int = STEPS) -> Run:
    """The script, with `library`'s DPOTrainer and DPOConfig.

    25 pairs are 9 batches of 3, the last one short: 20 steps pass two epochs' ends.
    """
    from datasets import Dataset
    from peft import LoraConfig

    model_folder = folder / "model"
    tiny.llama(num_hidden_layers=2).save_pretrained(model_folder)
    args = library.DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-2 if case.lora else 2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=5,
        beta=BETA,
        loss_type=case.loss.split("+"),
        **case.more,
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    trainer = library.DPOTrainer(
        model=str(model_folder),
        args=args,
        train_dataset=Dataset.from_list(rows(25, case.conversational)),
        processing_class=tiny.word_tokenizer(TEMPLATE),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        if case.lora
        else None,
    )
    trainer.train()
    history = [record for record in trainer.state.log_history if "loss" in record]
    return Run(history, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
