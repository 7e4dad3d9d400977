"""What is read from the source of TrainingArguments is what the class says once it is imported."""

from __future__ import annotations

import dataclasses
import enum
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from preftree.config.flags import CHOSEN_LATER, Kind
from preftree.config.train import TrainSettings, parse_settings
from preftree.config.trainer_flags import trainer_flags
from preftree.errors import SettingsError
from preftree.train.arguments import recomputes, start_arguments

#: No flag can say it.
OBJECTS = {"parallelism_config"}


def test_every_field_is_a_flag() -> None:
    fields = {item.name: item for item in dataclasses.fields(TrainingArguments) if item.init}
    flags = trainer_flags()
    assert set(flags) == set(fields) - OBJECTS
    for name, flag in flags.items():
        default = fields[name].default
        if fields[name].default_factory is not dataclasses.MISSING:
            default = fields[name].default_factory()
        assert flag.default == default or flag.default is CHOSEN_LATER, name
        assert flag.help == str(fields[name].metadata.get("help", "")).replace("%%", "%"), name
        if isinstance(default, bool):
            assert flag.kind is Kind.BOOL, name
        elif isinstance(default, int):
            assert flag.kind in (Kind.INT, Kind.FLOAT), name
    assert [name for name, flag in flags.items() if flag.default is CHOSEN_LATER] == ["optim"]
    assert "cosine_with_min_lr" in flags["lr_scheduler_type"].choices
    assert flags["save_strategy"].choices == ("no", "steps", "epoch", "best")


def test_arguments_are_the_settings() -> None:
    flags = "--learning_rate 3e-4 --gradient_checkpointing --warmup_steps 0.1 --eval_strategy epoch --seed 5 --use_cpu"
    base = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]
    arguments = start_arguments(parse_settings([*base, *flags.split()]).train)
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.seed) == (3e-4, 0.1, 5)
    assert arguments.activation_checkpointing
    assert arguments.eval_strategy == "epoch"
    assert isinstance(arguments.eval_strategy, enum.Enum)
    assert (arguments.report_to, arguments.logging_steps, arguments.device.type) == ([], 10, "cpu")
    assert arguments.fsdp_plugin_args is None


def test_what_transformers_refuses_is_one_message() -> None:
    with pytest.raises(SettingsError, match="transformers refuses the training flags"):
        start_arguments(TrainSettings(output_dir="O", trainer={"tf32": True, "use_cpu": True}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"gradient_checkpointing": True}, True),  # transformers 5.17 has this name only
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, True),
        ({"activation_checkpointing": False, "gradient_checkpointing": None}, False),
    ],
)
def test_checkpointing_has_another_name_in_older_transformers(arguments: dict[str, Any], expected: bool) -> None:
    assert recomputes(SimpleNamespace(**arguments)) is expected  # type: ignore[arg-type]
