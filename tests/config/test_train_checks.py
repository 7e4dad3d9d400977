"""Values that would fail later, or train nothing, are refused while the command line is read, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.config import train_checks
from preftree.config.train import Settings, parse_settings
from preftree.errors import SettingsError

BASE = "--model_name_or_path M --dataset_name D --output_dir O"


def parse(line: str) -> Settings:
    return parse_settings(f"{BASE} {line}".split())


def refusal(line: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(line)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "piece"),
    [
        ("--seed -1", "--seed must be at least 0 and at most 4.29497e+09. Got -1"),
        (f"--seed {2**70}", "--seed must be at least 0"),
        ("--data_seed -3", "--data_seed must be at least 0"),
        ("--adam_beta1 2", "--adam_beta1 must be at least 0 and below 1"),
        ("--adam_beta2 1", "--adam_beta2 must be at least 0 and below 1"),
        ("--adam_epsilon -1", "--adam_epsilon must be at least 0"),
        ("--beta 1e38", "--beta must be above 0 and at most 10000"),
        ("--learning_rate nan", "--learning_rate must be at least 0"),
        ("--save_steps 0", "--save_steps must be above 0"),
        ("--save_steps 2.5", "--save_steps must be whole above 1"),
        ("--logging_steps 0", "--logging_steps must be above 0"),
        ("--eval_strategy steps --eval_steps 0", "--eval_steps must be above 0"),
        ("--max_memory infGB", "--max_memory infGB: write a number and a unit"),
        ("--max_memory 2Gbit", "--max_memory 2Gbit: write a number and a unit"),
        ("--save_strategy best", "--save_strategy best needs --eval_strategy steps (or epoch)"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers must be at least 0"),
        ("--dataloader_prefetch_factor 2", "needs --dataloader_num_workers above 0"),
        ("--dataloader_persistent_workers", "needs --dataloader_num_workers above 0"),
        ("--save_total_limit 0", "--save_total_limit must be at least 1"),
        ("--log_level loud", "--log_level must be one of detail"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "needs --eval_strategy steps or epoch"),
        ("--lr_scheduler_type cosine_with_min_lr", "needs min_lr or min_lr_rate in --lr_scheduler_kwargs"),
        ("--lr_scheduler_kwargs {1}", "--lr_scheduler_kwargs must be a JSON object"),
        ("--accelerator_config nowhere.json", "--accelerator_config must be a JSON object"),
        ("--load_best_model_at_end --eval_strategy epoch", "requires that --eval_strategy and --save_strategy"),
        ("--load_best_model_at_end --eval_strategy steps --eval_steps 3 --save_steps 10", "is a multiple of"),
        ("--report_to tensorbord", "--report_to must be one of none, all"),
        ("--bf16_full_eval --fp16_full_eval", "At most one of --fp16_full_eval and --bf16_full_eval"),
        ("--use_cpu --device cuda", "--use_cpu and --device cuda contradict each other"),
        ("--loss_type sigmoid ipo --loss_weights 1", "must have the same length"),
        ("--loss_weights one", "--loss_weights must be a number. Got 'one'"),
    ],
)
def test_a_value_that_cannot_be_used(line: str, piece: str) -> None:
    assert piece in refusal(line)


def test_everything_at_once() -> None:
    text = refusal("--seed -1 --adam_beta1 2 --save_steps 0 --lora_rank 0 --max_length 1 --loss_type none")
    assert text.startswith("7 problems")  # max_length is also not above max_prompt_length


def test_what_can_be_used() -> None:
    line = '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6} --loss_type sigmoid ipo'
    train = parse(f"{line} --loss_weights 1 0.5 --load_best_model_at_end --eval_strategy steps --eval_steps 250").train
    assert (train.loss_type, train.loss_weights) == (["sigmoid", "ipo"], [1.0, 0.5])


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_checks, "find_spec", lambda name: None)
    text = refusal("--optim adamw_bnb_8bit --report_to wandb tensorboard")
    for package in ("bitsandbytes", "wandb", "tensorboard"):
        assert f"pip install {package}" in text
    assert "pip install galore-torch" in refusal("--optim galore_adamw_8bit")
    assert "pip install torchao" in refusal("--optim adamw_torch_8bit")
    monkeypatch.setattr(train_checks, "find_spec", lambda name: object())
    assert parse("--optim adamw_bnb_8bit --report_to wandb tensorboard").train.report_to == ["wandb", "tensorboard"]


def test_pushing_while_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert parse("--push_to_hub").train.push_to_hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "--push_to_hub cannot work while HF_HUB_OFFLINE is set" in refusal("--push_to_hub")


def test_evaluation_needs_data(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    line = f"--dataset_name {tmp_path / 'pairs.jsonl'} --eval_strategy epoch --validation_split_percentage 0"
    assert "--eval_strategy epoch needs validation data" in refusal(line)
    assert parse(f"{line} --validation_file F").data.validation_file == "F"


def test_nothing_is_learned_without_a_note() -> None:
    assert "--learning_rate 0: nothing is learned." in parse("--learning_rate 0").notes
