"""The training stage: from settings to an adapter on disk. It reads settings and calls `DPOTrainer`."""

from __future__ import annotations

import copy
import os
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed

from preftree.config.shared import ModelSettings
from preftree.config.train import Settings
from preftree.data.sources import refuse_inside
from preftree.errors import RunError, SettingsError
from preftree.hardware.device import choose_device
from preftree.hardware.environment import environment
from preftree.hardware.memory import keep_freed_memory, room_for
from preftree.hardware.precision import choose_dtype
from preftree.io.console import Say, sayer
from preftree.io.run_folder import RunFolder
from preftree.model.load import ModelSource, code_note, load_model, load_tokenizer, resolve, resolve_tokenizer
from preftree.model.lora import lora_config
from preftree.publish.hub import check_writable, hub_repository
from preftree.train.arguments import start_arguments
from preftree.train.closing import check_room, close
from preftree.train.config import DPOConfig
from preftree.train.dataset import PairDataset
from preftree.train.estimate import TIMED_STEPS, Planned, measure
from preftree.train.inputs import hub_options, prepare_pairs
from preftree.train.live import RunLog
from preftree.train.profile import StepProfile
from preftree.train.recorder import RunRecorder
from preftree.train.sampling import PromptSampler, sample_prompts
from preftree.train.setup import RESTART
from preftree.train.trainer import DPOTrainer


def train(settings: Settings, console: Console | None = None, *, commands: bool = True) -> int:
    """Train as `settings` say; returns the process's exit code.

    Args:
        commands: end with the commands that go on from there.

    Leaves in the output folder: the adapter, the tokenizer, trainer_state.json, checkpoints and `run/`.

    Raises:
        PreftreeError: whatever the user can fix, before anything is overwritten.
    """
    if settings.train.dry_run:
        return _dry_run(settings, console)
    args = start_arguments(settings.train, attention=settings.model.attention)
    console = console or Console(quiet=args.process_index != 0, soft_wrap=True)
    say = sayer(console)
    folder, asked = RunFolder(args.output_dir or ""), _asked_checkpoint(settings)
    claim: dict[str, Any] = {
        "resume": asked is not None,
        "overwrite": settings.train.overwrite_output_dir,
        "fingerprint": settings.fingerprint(),
        "config": settings.as_dict(),
    }
    refuse_inside("--output_dir", args.output_dir, settings.data.dataset_name)
    folder.check(**claim)  # before minutes of loading
    if settings.train.push_to_hub and args.process_index == 0:
        repository = hub_repository(args.hub_model_id, folder.output_dir)
        say(f"hub        asking whether {repository} can be written")
        check_writable(repository, private=bool(args.hub_private_repo), token=args.hub_token, flag="--push_to_hub true")
    _tell_ranks(args, say)
    with folder.held() if args.should_save else nullcontext():
        trainer, recorder = _trainer(settings, args, folder, console)
        with trainer.ranks.explained(RESTART):
            begun = _claim(trainer, folder, claim)
            if begun and asked is None and (step := folder.finished()) is not None:
                say(f"finished   {args.output_dir} holds this very run, all {step} steps of it; nothing was computed")
                say("           --overwrite_output_dir true trains it anew")
                return 0
            check_room(trainer, say)
            _run(trainer, settings if commands else None, recorder, asked or begun, say)
    return 0


def _dry_run(settings: Settings, console: Console | None) -> int:
    """A few steps of the run in a temporary folder, and what they say about all of it."""
    wanted = copy.copy(settings.train)
    with tempfile.TemporaryDirectory(prefix="preftree-dry-run-") as place:
        trial = settings.train
        trial.output_dir, trial.sample_prompts, trial.report_to = place, None, "none"
        trial.trainer = trial.trainer | {"max_steps": TIMED_STEPS + 1, "save_strategy": "no", "eval_strategy": "no"}
        trial.trainer |= {"push_to_hub": False, "load_best_model_at_end": False}
        args = start_arguments(trial, attention=settings.model.attention)
        console = console or Console(quiet=args.process_index != 0, soft_wrap=True)
        say = sayer(console)
        _tell_ranks(args, say)
        trainer, _ = _trainer(settings, args, RunFolder(place), console)
        held_out = len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0
        planned = Planned.of(wanted, len(trainer.train_dataset), trainer.ranks.count, held_out)
        for line in measure(trainer, planned, say).lines():
            say(line)
    return 0


def _claim(trainer: DPOTrainer, folder: RunFolder, claim: dict[str, Any]) -> bool:
    """Make the output folder this run's; returns on all ranks whether this very run was begun there before."""
    begun = False
    if trainer.args.should_save:
        try:
            begun = folder.claim(**claim, identity=trainer.identity)
            folder.write_env(environment())
        except OSError as problem:
            raise RunError(
                f"--output_dir {folder.output_dir} cannot be written ({problem.strerror or problem}). Make room there, "
                "or give another folder."
            ) from problem
    return bool(trainer.ranks.gather([begun])[0][0])


def _tell_ranks(args: DPOConfig, say: Say) -> None:
    """Say how many processes there are."""
    if args.world_size > 1:
        say(f"ranks      {args.world_size}: {args.sharding.reason}; LoRA's gradients are all-reduced once per step")
    elif args.sharding.base:
        say("ranks      one, so there is nothing to shard the base model over")


def _trainer(
    settings: Settings, args: DPOConfig, folder: RunFolder, console: Console
) -> tuple[DPOTrainer, RunRecorder]:
    """The trainer, with the command's model, data and adapter, and what records its runs."""
    say = sayer(console)
    device = choose_device("auto" if args.use_habana else settings.train.device, str(args.device))
    dtype = choose_dtype(device.value, settings.model.torch_dtype, bf16=settings.train.bf16, fp16=settings.train.fp16)
    _check_memory(args, device.value)
    source = resolve(settings.model.model_name_or_path or "")
    say(f"device     {device}")
    say(f"precision  {dtype}")
    tokenizer = _tokenizer(settings, source)
    splits = prepare_pairs(settings, tokenizer, console)
    set_seed(args.seed)
    if (trusted := settings.model.trust_remote_code) and (note := code_note(source)):
        say(f"code       {note}")
    quantization = _quantization(settings.model, dtype.value)
    model = load_model(
        source, dtype.value, remote_code=trusted, quantization_config=quantization, **hub_options(settings)
    )
    args.bf16 = args.fp16 = False  # weights and activations have this dtype, nothing is autocast
    if device.value == "cpu":
        # From here on: what loading has freed is given back in any case.
        keep_freed_memory(args.max_memory is None)
    lora = settings.lora
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=PairDataset(splits.train, by_prompt=settings.data.pair_rule in ("best_each", "all")),
        eval_dataset=PairDataset(splits.validation) if splits.validation else None,
        processing_class=tokenizer,
        peft_config=lora_config(
            model,
            rank=lora.lora_rank,
            alpha=lora.lora_alpha,
            dropout=0.0 if args.disable_dropout else lora.lora_dropout,
            target_modules=None if lora.lora_all_linear else lora.lora_target_modules,
        ),
        callbacks=[RunLog(folder, say), *([StepProfile(console)] if settings.train.profile else [])],
        console=console,
    )
    recorder = RunRecorder(folder, splits)
    recorder.follow(trainer)
    if settings.train.sample_prompts:
        prompts = sample_prompts(settings, splits, tokenizer)
        PromptSampler(folder, prompts, settings.train.sample_steps, settings.train.sample_tokens).follow(trainer)
    return trainer, recorder


def _quantization(settings: ModelSettings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What the command's flags ask for; products are computed in `dtype`. None where they ask for nothing."""
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_memory(args: DPOConfig, device: str) -> None:
    """Refuse a limit that this process is above before anything is loaded."""
    if device == "cpu" and args.max_bytes is not None and (room := room_for(args.max_bytes)) <= 0:
        raise SettingsError(
            f"--max_memory {args.max_memory} is too little: torch and transformers alone take "
            f"{(args.max_bytes - room) / 2**30:.2f} GiB. Give at least 0.4 GiB more than that and the model's weights."
        )


def _run(trainer: DPOTrainer, settings: Settings | None, recorder: RunRecorder, resume: str | bool, say: Say) -> None:
    """Train, validate, save, and say what came out.

    Args:
        settings: for the commands that go on from there; None for none.
        resume: a checkpoint, or true for the newest whole one if there is any.
    """
    result = trainer.train(resume_from_checkpoint=resume)
    if trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
        trainer.evaluate()
    try:
        trainer.save_model(_internal_call=True)  # else Trainer would upload before the card and the results are there
        trainer.save_state()
        if trainer.args.should_save:
            recorder.write_examples()
            recorder.folder.finish(trainer.state.global_step)
    except OSError as problem:
        raise RunError(
            f"The final adapter could not be written to {trainer.args.output_dir} ({problem.strerror or problem}). "
            "Make room and give the same command again: it goes on from the newest checkpoint."
        ) from problem
    close(trainer, settings, result.metrics.get("train_runtime", 0.0), say)


def _asked_checkpoint(settings: Settings) -> str | bool | None:
    """What `--resume_from_checkpoint` names: a folder, true for the newest checkpoint, None if it is not given."""
    asked = str(settings.train.resume_from_checkpoint or "").strip()
    if asked.lower() in ("", "false", "no", "none"):
        return None
    if asked.lower() in ("true", "yes", "last"):
        return True
    if not os.path.isdir(asked):
        raise RunError(f"--resume_from_checkpoint {asked}: there is no such folder.")
    return asked


def _tokenizer(settings: Settings, source: ModelSource) -> PreTrainedTokenizerBase:
    own = settings.model.tokenizer_name
    place = resolve_tokenizer(own) if own else source
    model = settings.model
    return load_tokenizer(
        place, use_fast=model.use_fast_tokenizer, remote_code=model.trust_remote_code, **hub_options(settings)
    )
