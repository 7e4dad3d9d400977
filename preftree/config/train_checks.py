"""What is wrong with the settings of a training run, found before anything slow, and what is odd about them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from preftree.config.checks import json_object, memory_size, one_of, refuse, within
from preftree.config.choices import LIST_RULE, PAIR_RULES

if TYPE_CHECKING:
    from preftree.config.shared import DataSettings, LoraSettings
    from preftree.config.train import TrainSettings

_LARGEST_SEED = 2**32 - 1  # of numpy's generators
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
#: Part of an optimizer's name -> the Python module that it needs, and what to install.
_OPTIMIZER_PACKAGES = {
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "8bit": ("bitsandbytes", "bitsandbytes"),
    "paged": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
    "lion": ("bitsandbytes", "bitsandbytes"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "4bit": ("torchao", "torchao"),
    "torch_8bit": ("torchao", "torchao"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "apex": ("apex", "apex"),
}
#: Optimizers whose update is part of a backward pass.
_UPDATE_IN_BACKWARD = ("lomo", "layerwise")
#: A tracker of --report_to -> the Python modules of which it needs one, and what to install.
_TRACKER_PACKAGES = {
    "azure_ml": (("azureml",), "azureml-mlflow"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
#: A schedule -> keys of --lr_scheduler_kwargs of which it needs one.
_SCHEDULE_KEYS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
_JSON_FLAGS = (
    "accelerator_config", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs",
)  # fmt: skip
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def check_training(train: TrainSettings) -> list[str]:
    """Everything that is wrong with the training group itself."""
    problems = [*train.loss_problems(), *check_trainer(train)]
    if not train.output_dir:
        problems.append("--output_dir is missing: name a folder for the adapter, the checkpoints and the logs.")
    _samples(train, problems)
    _steps(train, problems)
    _devices(train, problems)
    _contradictions(train, problems)
    return problems


def check_trainer(args: Any) -> list[str]:
    """What is wrong with fields of TrainingArguments and would show later: when training begins, or never.

    Args:
        args: the command's training group, or a script's `DPOConfig`.
    """
    problems: list[str] = []
    _numbers(args, problems)
    _packages(args, problems)
    _schedule(args, problems)
    for name in _JSON_FLAGS:
        value = getattr(args, name, None)
        if isinstance(value, str) and not (name == "accelerator_config" and os.path.isfile(value)):
            json_object(problems, name, value)
    return problems


def _numbers(train: Any, problems: list[str]) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        within(problems, name, getattr(train, name), 1)
    for name in ("tokens_per_forest", "ddp_timeout", "save_total_limit", "torch_empty_cache_steps"):
        within(problems, name, getattr(train, name), 1)
    for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers"):
        within(problems, name, getattr(train, name), 0)
    for name in ("adam_beta1", "adam_beta2"):
        within(problems, name, getattr(train, name), 0, 1, below=True)
    within(problems, "adam_epsilon", train.adam_epsilon, 0)
    for name in ("seed", "data_seed"):
        within(problems, name, getattr(train, name), 0, _LARGEST_SEED)
    for name in ("log_level", "log_level_replica"):
        one_of(problems, name, getattr(train, name), _LOG_LEVELS)
    if train.max_steps <= 0:
        within(problems, "num_train_epochs", train.num_train_epochs, 0, above=True)
    memory_size(problems, "max_memory", train.max_memory)


def _samples(train: TrainSettings, problems: list[str]) -> None:
    """Answers to fixed prompts while training."""
    for name in ("sample_steps", "sample_tokens"):
        within(problems, name, getattr(train, name), 1)
    if (train.sample_prompts or "1").isdecimal():
        within(problems, "sample_prompts", int(train.sample_prompts or 1), 1)
    elif not os.path.exists(train.sample_prompts or ""):
        problems.append(f"--sample_prompts {train.sample_prompts}: there is no such file, and it is no number.")


def _steps(train: TrainSettings, problems: list[str]) -> None:
    """When to log, to evaluate and to save."""
    for what in ("logging", "eval", "save"):
        name, steps = f"{what}_steps", getattr(train, f"{what}_steps")
        if getattr(train, f"{what}_strategy") != "steps" or (what == "eval" and steps is None):
            continue
        within(problems, name, steps, 0, above=True)
        if steps > 1 and steps != int(steps):
            problems.append(f"--{name} must be whole above 1; below 1 it is a share of all steps. Got {steps}.")
    if train.save_strategy == "best" and (train.eval_strategy == "no" or not train.metric_for_best_model):
        problems.append(
            "--save_strategy best needs --eval_strategy steps (or epoch) and --metric_for_best_model loss: it saves"
            " when that metric improves."
        )
    needs_evaluation = train.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if needs_evaluation and train.eval_strategy == "no":
        problems.append(f"--lr_scheduler_type {train.lr_scheduler_type} needs --eval_strategy steps or epoch.")
    if train.load_best_model_at_end and train.save_strategy != "best":
        if train.eval_strategy != train.save_strategy:
            problems.append(
                "--load_best_model_at_end requires that --eval_strategy and --save_strategy are the same. Got"
                f" {train.eval_strategy} and {train.save_strategy}."
            )
        elif train.eval_strategy == "steps" and (train.save_steps / (train.eval_steps or train.logging_steps)) % 1:
            problems.append("--load_best_model_at_end requires that --save_steps is a multiple of --eval_steps.")


def _devices(train: TrainSettings, problems: list[str]) -> None:
    if train.use_cpu and train.device not in ("auto", "cpu"):
        problems.append(f"--use_cpu and --device {train.device} contradict each other: leave one of them out.")
    if train.use_habana and (train.use_cpu or train.device not in ("auto", "hpu")):
        other = "--use_cpu" if train.use_cpu else f"--device {train.device}"
        problems.append(f"--use_habana and {other} contradict each other: leave one of them out.")
    if train.use_hpu_graphs_for_training and not train.use_lazy_mode:
        problems.append("--use_hpu_graphs_for_training needs --use_lazy_mode: add it, or leave the graphs out.")


def _packages(train: Any, problems: list[str]) -> None:
    """Optional packages that are asked for and not installed, and a hub that cannot be reached by choice."""
    optimizer = _word(getattr(train, "optim", ""))
    needed = next((need for part, need in reversed(_OPTIMIZER_PACKAGES.items()) if part in optimizer), None)
    if any(word in optimizer for word in _UPDATE_IN_BACKWARD):
        problems.append(
            f"--optim {optimizer} is not supported: it updates weights within a backward pass, and a step here is "
            "several of them, one per forest. Choose another, such as adamw_torch."
        )
    elif needed and find_spec(needed[0]) is None:
        problems.append(f"--optim {optimizer} needs a package that is not installed: pip install {needed[1]}")
    asked = train.report_to if isinstance(train.report_to, list) else [train.report_to or "none"]
    for tracker in asked:
        if tracker in ("none", "all"):
            continue
        if tracker not in _TRACKER_PACKAGES:
            one_of(problems, "report_to", tracker, ("none", "all", *_TRACKER_PACKAGES))
            continue
        modules, package = _TRACKER_PACKAGES[tracker]
        if not any(find_spec(module) for module in modules):
            problems.append(f"--report_to {tracker} needs a package that is not installed: pip install {package}")
    if train.push_to_hub and (name := next((name for name in _OFFLINE if _is_on(os.environ.get(name))), None)):
        problems.append(f"--push_to_hub cannot work while {name} is set: unset it, or leave the flag out.")


def _contradictions(train: TrainSettings, problems: list[str]) -> None:
    if train.label_smoothing_factor:
        problems.append("--label_smoothing_factor is for next-token losses; DPO's is --label_smoothing.")
    if train.bf16 and train.fp16:
        problems.append("At most one of --fp16 and --bf16 can be given: leave one of them out.")
    if train.bf16_full_eval and train.fp16_full_eval:
        problems.append("At most one of --fp16_full_eval and --bf16_full_eval can be given: leave one of them out.")
    if train.dataloader_num_workers == 0:
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if getattr(train, name):
                problems.append(f"--{name} needs --dataloader_num_workers above 0.")


def _schedule(train: Any, problems: list[str]) -> None:
    schedule = _word(train.lr_scheduler_type)
    keys = _SCHEDULE_KEYS.get(schedule, ())
    if keys and not any(f'"{key}"' in json.dumps(train.lr_scheduler_kwargs or {}).replace("\\", "") for key in keys):
        problems.append(
            f"--lr_scheduler_type {schedule} needs {' or '.join(keys)} in --lr_scheduler_kwargs, as in"
            f""" '{{"{keys[0]}": 1}}'."""
        )


def _word(value: Any) -> str:
    """A choice as a word: scripts give members of transformers' enumerations as well."""
    return str(getattr(value, "value", value))


def check_validation(values: Mapping[str, Any], problems: list[str]) -> None:
    """Evaluation during training needs something to evaluate on, as far as can be told before the data is read."""
    if values["eval_strategy"] == "no" or values["validation_file"] or values["validation_split_percentage"]:
        return
    if os.path.isfile(values["dataset_name"] or ""):
        problems.append(
            f"--eval_strategy {values['eval_strategy']} needs validation data: give --validation_file, or"
            " --validation_split_percentage above 0."
        )


def check_pair_rule(train: TrainSettings, data: DataSettings) -> None:
    """The rule that goes with the loss, where none is given. Raises SettingsError where one contradicts it."""
    data.pair_rule = data.pair_rule or (LIST_RULE if train.ranks_lists else PAIR_RULES[0])
    if train.ranks_lists and data.pair_rule != LIST_RULE:
        refuse([
            f"--pair_rule {data.pair_rule} makes pairs, and --loss_type listwise ranks all answers of a prompt: leave "
            "--pair_rule out."
        ])  # fmt: skip
    if data.pair_rule == LIST_RULE and not train.ranks_lists:
        refuse(["--pair_rule list keeps all answers of a prompt, which only --loss_type listwise compares: add it."])


def advice(train: TrainSettings, lora: LoraSettings) -> list[str]:
    """Notes on settings that are accepted and do not do what one might think."""
    graphs, lazy = train.use_hpu_graphs_for_training, train.use_lazy_mode
    notes = {
        "--learning_rate 0: nothing is learned.": train.learning_rate == 0,
        "--gaudi_config_name: ignored, optimum-habana's configuration has no counterpart here.": bool(
            train.gaudi_config_name
        ),
        "--use_lazy_mode: the vendor no longer develops lazy mode; eager mode is the default here.": lazy
        and train.use_habana,
        "--pad_max: pads forests for devices that compile for each shape; here it only costs time.": train.pad_max
        and not train.use_habana,
        "--use_habana without --pad_max true: the device compiles for each forest's own shape.": train.use_habana
        and not train.pad_max,
        "--use_hpu_graphs_for_training: changes nothing; with --pad_max true lazy mode compiles a pass once and runs it"
        " again, and graphs recorded beside that could not be checked without a card.": graphs and train.use_habana,
        "--use_lazy_mode and --use_hpu_graphs_for_training do nothing without --use_habana.": (lazy or graphs)
        and not train.use_habana,
        "--lora_all_linear is on, so --lora_target_modules is not used; add --lora_all_linear false.": bool(
            lora.lora_all_linear and lora.lora_target_modules
        ),
    }
    return [text for text, applies in notes.items() if applies]


def _is_on(value: str | None) -> bool:
    return str(value or "").lower() in ("1", "true", "yes", "on")
