"""What flags, launchers and DeepSpeed files say about the base model on several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftree.config.train import parse_settings
from preftree.distributed.sharding import Sharding, hide_from_accelerate, read_sharding
from preftree.errors import SettingsError
from preftree.train.arguments import start_arguments

BASE = [
    "--model_name_or_path",
    "m",
    "--dataset_name",
    "d",
    "--output_dir",
    "o",
    "--use_cpu",
    "true",
    "--learning_rate",
    "5e-4",
]


def sharding(*flags: str) -> Sharding:
    return parse_settings([*BASE, *flags]).train.sharding


def from_launcher(**environ: str) -> tuple[Sharding, list[str]]:
    problems: list[str] = []
    flags = parse_settings(BASE).train.as_dict()
    return read_sharding(None, None, None, flags, environ, problems), problems


def test_whole_unless_asked_for() -> None:
    assert not sharding().base
    assert not sharding("--fsdp", "false").base


@pytest.mark.parametrize("flags", [["--fsdp"], ["--fsdp", "true"], ["--fsdp", "full_shard auto_wrap"]], ids=" ".join)
def test_fsdp_by_its_flag(flags: list[str]) -> None:
    assert sharding(*flags).base


def test_the_units_can_be_named() -> None:
    config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "fsdp_state_dict_type": "FULL_STATE_DICT"}
    assert sharding("--fsdp", "true", "--fsdp_config", json.dumps(config)).layers == ("LlamaDecoderLayer",)


def test_trainer_gets_no_plugin_of_its_own() -> None:
    args = start_arguments(parse_settings([*BASE, "--fsdp"]).train)
    assert args.fsdp_plugin_args is None
    assert args.deepspeed is None
    assert not args.fsdp


def test_accelerate_launch() -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    found, problems = from_launcher(**asked, FSDP_TRANSFORMER_CLS_TO_WRAP="MptBlock")
    assert (found.base, found.layers, problems) == (True, ("MptBlock",), [])
    found, _ = from_launcher(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    assert found.base
    hide_from_accelerate(asked)
    assert asked.keys() == {"FSDP_VERSION"}  # what would start a plugin is gone


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero(tmp_path: Path, stage: int) -> None:
    """The file as it is written for transformers: auto, or what the flags say."""
    content = {
        "zero_optimization": {"stage": stage, "overlap_comm": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 8,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "betas": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}},
    }
    (tmp_path / "zero.json").write_text(json.dumps(content))
    found = sharding("--deepspeed", str(tmp_path / "zero.json"), "--gradient_accumulation_steps", "8")
    assert found.base is (stage == 3)
    assert f"stage {stage}" in found.reason


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fsdp", "--deepspeed", '{"zero_optimization": {"stage": 3}}'], "leave one of them out"),
        (["--fsdp", "full_shard offload"], "CPU offload is not supported"),
        (["--fsdp", "hybrid_shard"], "hybrid sharding is not supported"),
        (["--fsdp", "shard_grad_op"], "leave FSDP out"),
        (["--fsdp", "--fsdp_config", '{"activation_checkpointing": true}'], "use --gradient_checkpointing true"),
        (["--fsdp", "--fsdp_config", '{"wrap": 1}'], "--fsdp_config: wrap is not supported"),
        (["--fsdp", "--fsdp_config", "nowhere.json"], "nowhere.json cannot be read: No such file"),
        (["--deepspeed", "[3]"], "cannot be read"),
        (
            ["--deepspeed", '{"gradient_accumulation_steps": 3}'],
            "_steps is 3, but the flags say 1",
        ),
        (["--deepspeed", '{"optimizer": {"type": "Lion"}}'], "choose it by --optim"),
        (["--deepspeed", '{"optimizer": {"params": {"lr": 0.1}}}'], "params.lr is 0.1, but the flags say 0.0005"),
        (["--deepspeed", '{"scheduler": {"type": "WarmupCosineLR"}}'], "choose it by --lr_scheduler_type"),
        (
            ["--deepspeed", '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}'],
            "offload_param is not supported",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_cannot_be_had(flags: list[str], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        sharding(*flags)
    assert words in str(refused.value)


def test_where_the_base_lies_is_not_what_is_learned() -> None:
    """A run may be resumed with another layout."""
    fingerprints: set[Any] = {parse_settings([*BASE, *flags]).fingerprint() for flags in ([], ["--fsdp"])}
    assert len(fingerprints) == 1
