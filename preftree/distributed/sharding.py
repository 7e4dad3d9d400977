"""Is the frozen base model replicated or sharded? What flags, launchers and config files say.

    --fsdp true [--fsdp_config FILE]     transformers' flags
    accelerate launch --use_fsdp …       its environment variables
    --deepspeed FILE                     the stages of ZeRO (arXiv 1910.02054)

All name the same two layouts, because nothing but LoRA is trained. What ZeRO's stages 1 and 2 shard, optimizer
states and gradients, is LoRA's alone and stays replicated; stage 3 and FSDP shard the weights, which is done by
torch's own FSDP2 (`model/shard.py`). DeepSpeed's engine is not used: it owns the backward pass and the
step, and a step here is several backward passes. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NO = ("", "false", "no", "none", "0")
#: What accelerate and transformers read to build plugins of their own.
_LAUNCHERS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_CPU_RAM_EFFICIENT_LOADING")
#: Settings of FSDP that choose nothing here: one wrap policy, plain adapters on disk, every rank loads.
_FSDP_WITHOUT_EFFECT = {
    "auto_wrap_policy", "backward_prefetch", "cpu_ram_efficient_loading", "forward_prefetch", "limit_all_gathers",
    "min_num_params", "state_dict_type", "sync_module_states", "use_orig_params", "activation_checkpointing",
    "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "version", "cpu_offload", "offload_params", "reshard_after_forward",
    "transformer_layer_cls_to_wrap", "transformer_cls_to_wrap", "sharding_strategy",
    "activation_checkpointing_offload",
}  # fmt: skip
#: What --fsdp may say; `auto_wrap` is what is done in any case, and the last two are refused by name.
_FSDP_WORDS = {
    "true", "yes", "1", "full_shard", "shard_grad_op", "auto_wrap", "offload", "hybrid_shard", "hybrid_shard_zero2",
}  # fmt: skip
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


@dataclass(frozen=True)
class Sharding:
    """How the base model lies on the ranks, and why.

    Args:
        base: sharded; else replicated on every rank.
        layers: class names of the modules that are gathered as one; empty for the model's own layer class.
    """

    base: bool = False
    layers: tuple[str, ...] = ()
    reason: str = "the base model is replicated on every rank; --fsdp true shards it"


def read_sharding(
    fsdp: Any,
    fsdp_config: Any,
    deepspeed: Any,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    problems: list[str],
) -> Sharding:
    """What was asked for; what cannot be had is added to `problems`.

    Args:
        fsdp, fsdp_config, deepspeed: the flags' values.
        flags: values of the flags that a DeepSpeed file may repeat, by flag name.
        environ: what accelerate's launcher has set is read from it.
    """
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in _NO and not deepspeed:
        file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        stage = int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        deepspeed = file if file.lower() != "none" else {"zero_optimization": {"stage": stage}}
    by_flag = str(fsdp or "").lower() not in _NO
    by_launcher = environ.get("ACCELERATE_USE_FSDP", "").lower() not in _NO
    if deepspeed and (by_flag or by_launcher):
        problems.append("--deepspeed and FSDP shard the same weights: leave one of them out.")
        return Sharding()
    if deepspeed:
        return _zero(_read(deepspeed, "deepspeed", problems), flags, problems)
    if by_flag:
        words = (" ".join(fsdp) if isinstance(fsdp, list) else str(fsdp)).lower().split()
        if unknown := [word for word in words if word not in _FSDP_WORDS]:
            problems.append(f"--fsdp {' '.join(unknown)} is not known: use --fsdp true, or leave it out.")
        config = {
            key.removeprefix("fsdp_"): value for key, value in _read(fsdp_config, "fsdp_config", problems).items()
        }
        if "shard_grad_op" in words:
            config["reshard_after_forward"] = False
        if "offload" in words:
            config["cpu_offload"] = True
        if "hybrid_shard" in words or "hybrid_shard_zero2" in words:
            problems.append(f"--fsdp {fsdp}: hybrid sharding is not supported; use --fsdp true.")
        return _fsdp(config, "asked for by --fsdp", problems)
    if isinstance(fsdp_config, str) and not by_launcher:
        problems.append("--fsdp_config needs --fsdp true: add it, or leave the file out.")
    if by_launcher:
        config = {key[5:].lower(): value for key, value in environ.items() if key.startswith("FSDP_")}
        return _fsdp(config, "asked for by accelerate launch --use_fsdp", problems)
    return Sharding()


def hide_from_accelerate(environ: MutableMapping[str, str]) -> None:
    """Remove what accelerate's launcher has set, or it would wrap the model in a plugin of its own."""
    for name in _LAUNCHERS:
        environ.pop(name, None)


def _fsdp(config: Mapping[str, Any], reason: str, problems: list[str]) -> Sharding:
    for key in config.keys() - _FSDP_WITHOUT_EFFECT - {"ignored_modules"}:
        problems.append(f"--fsdp_config: {key} is not supported.")
    if _yes(config.get("cpu_offload", config.get("offload_params"))):
        problems.append("FSDP's CPU offload is not supported: shard the weights over more ranks instead.")
    if _yes(config.get("activation_checkpointing")):
        problems.append("FSDP's activation_checkpointing is not supported: use --gradient_checkpointing true.")
    if str(config.get("version", 2)) == "1" and reason == "asked for by --fsdp":
        problems.append("--fsdp_config: version 1 of FSDP is gone; leave the version out.")
    layers = config.get("transformer_layer_cls_to_wrap") or config.get("transformer_cls_to_wrap") or ()
    names = layers.split(",") if isinstance(layers, str) else layers
    if str(config.get("reshard_after_forward", True)).lower() in (*_NO, "shard_grad_op"):
        problems.append("FSDP with reshard_after_forward false ends with all weights on every rank: leave FSDP out.")
    return Sharding(True, tuple(name.strip() for name in names), reason)


def _zero(config: Mapping[str, Any], flags: Mapping[str, Any], problems: list[str]) -> Sharding:
    """ZeRO's stage as a layout; what the file says of the training itself must be what the flags say."""
    zero = config.get("zero_optimization") or {}
    for part in ("offload_param", "offload_optimizer"):
        if str((zero.get(part) or {}).get("device", "none")).lower() != "none":
            problems.append(f"--deepspeed: {part} is not supported; set its device to none.")
    schedule = flags["lr_scheduler_type"]
    expected: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": flags["per_device_train_batch_size"],
        "gradient_accumulation_steps": flags["gradient_accumulation_steps"],
        "gradient_clipping": flags["max_grad_norm"],
        "bf16.enabled": flags["bf16"],
        "fp16.enabled": flags["fp16"],
        "optimizer.params.lr": flags["learning_rate"],
        "optimizer.params.weight_decay": flags["weight_decay"],
        "optimizer.params.eps": flags["adam_epsilon"],
        "optimizer.params.betas": [flags["adam_beta1"], flags["adam_beta2"]],
    }
    for name, value in _flat({key: config[key] for key in config if key != "zero_optimization"}):
        if value == "auto" or (name in expected and value == expected[name]):
            continue
        if name in expected:
            problems.append(f"--deepspeed: {name} is {value}, but the flags say {expected[name]}; write auto there.")
        elif name == "optimizer.type" and str(value).lower() not in ("adam", "adamw"):
            problems.append(f"--deepspeed: the optimizer is {value}; choose it by --optim.")
        elif name == "scheduler.type" and _SCHEDULES.get(value) != getattr(schedule, "value", schedule):
            problems.append(f"--deepspeed: the scheduler is {value}; choose it by --lr_scheduler_type.")
        elif name.startswith(("optimizer.params.", "scheduler.params.")):
            problems.append(f"--deepspeed: {name} has no effect here; write auto there and set it by its flag.")
    stage = zero.get("stage", 0)
    if stage == 3:
        return Sharding(True, (), "ZeRO stage 3, by torch's FSDP2 and not by DeepSpeed's engine")
    return Sharding(
        reason=f"ZeRO stage {stage} shards gradients and optimizer states; LoRA's are small and stay replicated"
    )


def _read(config: Any, flag: str, problems: list[str]) -> Mapping[str, Any]:
    """A mapping, given as such, as JSON text or as a JSON file."""
    if not config or isinstance(config, Mapping):
        return config or {}
    try:
        text = str(config)
        content = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"--{flag} {config} cannot be read: {getattr(error, 'strerror', None) or error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"--{flag} {config} must hold a JSON object.")
        return {}
    return content


def _flat(config: Mapping[str, Any], above: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, [*above, key])
        else:
            yield ".".join([*above, key]), value


def _yes(value: Any) -> bool:
    return str(value or "").lower() not in _NO
