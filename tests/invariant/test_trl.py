"""Step by step beside TRL's DPOTrainer: same model, ids, order, LoRA start and hyperparameters, same losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainingArguments

from preftree.data.encode import EncodedPair
from preftree.model.lora import add_lora
from preftree.model.score import attach
from preftree.train.reference import Reference
from preftree.train.step import Objective
from preftree.train.trainer import PreferenceTrainer
from tests.support import tiny

trl = pytest.importorskip("trl", reason="TRL is not installed (the test extra has it)")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

STEPS, BATCH = 20, 3
BETA = 0.2


def rows(count: int) -> list[dict[str, str]]:
    """Texts of known words; prompts repeat and share a beginning, answers have 1 to 7 words."""
    random = torch.Generator().manual_seed(7)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (1,), generator=random))
        ids = torch.randint(10, tiny.VOCABULARY, (length,), generator=random).tolist()
        return "".join(f" w{i}" for i in ids)

    system = words(10, 10)
    prompts = [words(1, 6), *(system + words(1, 5) for _ in range(4))]
    return [{"prompt": prompts[i % len(prompts)], "chosen": words(1, 7), "rejected": words(1, 7)} for i in range(count)]


def start() -> PeftModel:
    """A fresh adapter on a tiny Llama in float32: the same weights at every call."""
    base = tiny.llama(num_hidden_layers=2)
    torch.manual_seed(11)
    return add_lora(base, rank=4, alpha=8)


def shared_arguments(folder: Path, schedule: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 2e-2,
        "lr_scheduler_type": schedule,
        "warmup_steps": 3 if schedule == "linear" else 0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 5,
    }


def history(trainer: Any) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "loss" in record]


def run_trl(
    folder: Path, model: PeftModel, loss_type: str, schedule: str
) -> tuple[list[dict[str, float]], list[EncodedPair]]:
    """TRL's log, and the ids that it trained on."""
    from datasets import Dataset

    # 25 pairs are 9 batches, the last one short: 20 steps pass two epochs' ends.
    texts = rows(25)
    args = trl.DPOConfig(
        **shared_arguments(folder, schedule),
        loss_type=[loss_type],
        beta=BETA,
        max_length=None,
        gradient_checkpointing=False,
    )
    trainer = trl.DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(texts), processing_class=tiny.word_tokenizer()
    )
    pairs = [
        EncodedPair(tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"]), i, "trl")
        for i, row in enumerate(trainer.train_dataset)
    ]
    for pair, text in zip(pairs, texts, strict=True):
        ids = {name: tuple(int(word[1:]) for word in text[name].split()) for name in text}
        assert pair.prompt_ids == ids["prompt"]
        assert pair.chosen_ids == (*ids["chosen"], 2)
        assert pair.rejected_ids == (*ids["rejected"], 2)
    trainer.train()
    return history(trainer), pairs


def run_ours(
    folder: Path, model: PeftModel, pairs: list[EncodedPair], loss_type: str, schedule: str
) -> list[dict[str, float]]:
    scorer = attach(model)
    assert scorer.shares_prompts
    trainer = PreferenceTrainer(
        scorer,
        TrainingArguments(**shared_arguments(folder, schedule)),
        train_pairs=pairs,
        eval_pairs=[],
        reference=Reference(scorer),
        objective=Objective(loss_type, BETA),
        budget=60,  # several forests a step
    )
    trainer.train()
    assert trainer.speed.forests == 0  # read and reset by the last log line
    return history(trainer)


@pytest.mark.parametrize(("loss_type", "schedule"), [("sigmoid", "linear"), ("ipo", "constant"), ("hinge", "cosine")])
def test_the_same_losses_step_by_step(tmp_path: Path, loss_type: str, schedule: str) -> None:
    ours_start, trl_start = start(), start()
    for (name, mine), (_, theirs) in zip(ours_start.named_parameters(), trl_start.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    before = copy.deepcopy({name: p.detach() for name, p in tiny.trained(ours_start).items()})
    expected, pairs = run_trl(tmp_path / "trl", trl_start, loss_type, schedule)
    found = run_ours(tmp_path / "ours", ours_start, pairs, loss_type, schedule)

    assert len(found) == len(expected) == STEPS
    scale = 1 / (2 * BETA) ** 2 if loss_type == "ipo" else 1.0  # where the loss starts
    for step, (have, want) in enumerate(zip(found, expected, strict=True)):
        assert have["loss"] == pytest.approx(want["loss"], abs=1e-4 * scale), f"step {step}"
        assert have["learning_rate"] == want["learning_rate"]
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert have[name] == pytest.approx(want[name], abs=1e-3), f"step {step}: {name}"
        assert have["rewards/accuracies"] == pytest.approx(want["rewards/accuracies"], abs=1e-6)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
    # It is training that is compared: the losses move and so do the weights.
    assert max(record["loss"] for record in found) - min(record["loss"] for record in found) > 0.05 * scale
    trained = tiny.trained(ours_start)
    assert all(not torch.equal(trained[name], start) for name, start in before.items())
    for name, parameter in tiny.trained(trl_start).items():
        if name in trained:  # TRL has a copy of the adapter beside it, for its reference
            torch.testing.assert_close(trained[name], parameter, rtol=0, atol=1e-3)
