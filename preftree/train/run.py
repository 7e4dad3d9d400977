"""The training stage: from settings to an adapter on disk. It reads settings and calls `DPOTrainer`."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from preftree.config.train import Settings
from preftree.data.sources import refuse_inside
from preftree.errors import RunError
from preftree.hardware.device import choose_device
from preftree.hardware.environment import environment
from preftree.hardware.memory import keep_freed_memory
from preftree.hardware.precision import choose_dtype
from preftree.io.console import sayer
from preftree.io.run_folder import RunFolder
from preftree.model.load import ModelSource, load_model, load_tokenizer, resolve
from preftree.model.lora import lora_config
from preftree.train.arguments import start_arguments
from preftree.train.config import DPOConfig
from preftree.train.dataset import PairDataset
from preftree.train.inputs import Say, hub_options, prepare_pairs
from preftree.train.live import RunLog
from preftree.train.profile import StepProfile
from preftree.train.setup import RESTART
from preftree.train.trainer import DPOTrainer


def train(settings: Settings, console: Console | None = None) -> int:
    """Train as `settings` say; returns the process's exit code.

    Leaves in the output folder: the adapter, the tokenizer, trainer_state.json, checkpoints and `run/`.

    Raises:
        PreftreeError: whatever the user can fix, before anything is overwritten.
    """
    args = start_arguments(settings.train, attention=settings.model.attention)
    console = console or Console(quiet=args.process_index != 0, soft_wrap=True)
    say: Say = sayer(console)
    folder, resume = RunFolder(args.output_dir or ""), _checkpoint(settings)
    claim: dict[str, Any] = {
        "resume": resume is not None,
        "overwrite": settings.train.overwrite_output_dir,
        "fingerprint": settings.fingerprint(),
        "config": settings.as_dict(),
    }
    refuse_inside("--output_dir", args.output_dir, settings.data.dataset_name)
    folder.check(**claim)  # before minutes of loading
    _tell_ranks(args, say)
    trainer = _trainer(settings, args, folder, console)
    if args.should_save:
        folder.claim(**claim)
        folder.write_env(environment())
    with trainer.ranks.explained(RESTART):
        _run(trainer, resume, say)
    return 0


def _tell_ranks(args: DPOConfig, say: Say) -> None:
    """Say how many processes there are."""
    if args.world_size > 1:
        say(f"ranks      {args.world_size}: {args.sharding.reason}; LoRA's gradients are all-reduced once per step")
    elif args.sharding.base:
        say("ranks      one, so there is nothing to shard the base model over")


def _trainer(settings: Settings, args: DPOConfig, folder: RunFolder, console: Console) -> DPOTrainer:
    """The trainer, with the command's model, data and adapter."""
    say: Say = sayer(console)
    device = choose_device("auto" if args.use_habana else settings.train.device, str(args.device))
    dtype = choose_dtype(device.value, settings.model.torch_dtype, bf16=settings.train.bf16, fp16=settings.train.fp16)
    source = resolve(settings.model.model_name_or_path or "")
    say(f"device     {device}")
    say(f"precision  {dtype}")
    tokenizer = _tokenizer(settings, source)
    splits = prepare_pairs(settings, tokenizer, console, say)
    set_seed(args.seed)
    model = load_model(source, dtype.value, **hub_options(settings))
    args.bf16 = args.fp16 = False  # weights and activations have this dtype, nothing is autocast
    if device.value == "cpu":
        # From here on: what loading has freed is given back in any case.
        keep_freed_memory(args.max_memory is None)
    lora = settings.lora
    return DPOTrainer(
        model,
        args=args,
        train_dataset=PairDataset(splits.train, by_prompt=settings.data.pair_rule != "best_worst"),
        eval_dataset=PairDataset(splits.validation) if splits.validation else None,
        processing_class=tokenizer,
        peft_config=lora_config(
            model,
            rank=lora.lora_rank,
            alpha=lora.lora_alpha,
            dropout=0.0 if args.disable_dropout else lora.lora_dropout,
            target_modules=None if lora.lora_all_linear else lora.lora_target_modules,
        ),
        callbacks=[RunLog(folder), *([StepProfile(console)] if settings.train.profile else [])],
        console=console,
    )


def _run(trainer: DPOTrainer, resume: str | None, say: Say) -> None:
    result = trainer.train(resume_from_checkpoint=resume)
    if trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    seconds = result.metrics.get("train_runtime", 0.0)
    say(f"trained    {trainer.state.global_step} steps in {seconds:.0f} s{_reference_counts(trainer)}")
    if trainer.ranks.count > 1:
        more = trainer.live_metrics.speed.imbalance(trainer.ranks.count)
        say(f"           the busiest rank of a step had {100 * more:.1f} % more tokens than the mean")
    last = next((record for record in reversed(trainer.state.log_history) if "eval_loss" in record), None)
    if last is not None:
        accuracy, margin = last["eval_rewards/accuracies"], last["eval_rewards/margins"]
        say(f"validation loss {last['eval_loss']:.4f}, accuracy {accuracy:.2f}, margin {margin:+.3f}")
    say(f"saved      {trainer.args.output_dir}: adapter, tokenizer, trainer_state.json, run/")


def _reference_counts(trainer: DPOTrainer) -> str:
    reference = trainer.reference
    if reference is None:
        return ""
    counts = trainer.ranks.gather([reference.misses, reference.hits])
    computed, reused = (sum(column) for column in zip(*counts, strict=True))
    return f"; reference: {computed} answers computed, {reused} reused"


def _checkpoint(settings: Settings) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means, which may be 'true' for the last one."""
    asked, output = settings.train.resume_from_checkpoint, settings.train.output_dir or ""
    if not asked or str(asked).lower() in ("false", "no", "none"):
        return None
    if str(asked).lower() in ("true", "yes", "last"):
        last = get_last_checkpoint(output) if os.path.isdir(output) else None
        if last is None:
            raise RunError(f"--resume_from_checkpoint: {output} holds no checkpoint; leave the flag out to start")
        return last
    if not os.path.isfile(os.path.join(str(asked), "trainer_state.json")):
        raise RunError(f"--resume_from_checkpoint {asked}: no checkpoint there (a folder with trainer_state.json)")
    return str(asked)


def _tokenizer(settings: Settings, source: ModelSource) -> PreTrainedTokenizerBase:
    own = settings.model.tokenizer_name
    place = resolve(own) if own else source
    return load_tokenizer(place, use_fast=settings.model.use_fast_tokenizer, **hub_options(settings))
