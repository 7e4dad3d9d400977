"""The training stage: from settings to an adapter on disk."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from preftree.config.train import Settings
from preftree.data.sources import refuse_inside
from preftree.distributed.ranks import Ranks
from preftree.distributed.sharding import Sharding
from preftree.errors import RunError
from preftree.forest import Shape
from preftree.hardware.device import choose_device, gemm_peak, kind_of
from preftree.hardware.environment import environment
from preftree.hardware.memory import keep_freed_memory, room_for
from preftree.hardware.precision import choose_dtype
from preftree.io.cache import cache_folder, cache_root
from preftree.io.console import sayer
from preftree.io.run_folder import RunFolder
from preftree.model.cpu.linear import product_with
from preftree.model.determinism import check_causal, remove_randomness
from preftree.model.load import ModelSource, load_model, load_tokenizer, resolve
from preftree.model.lora import add_adapter, lora_config
from preftree.model.score import Scorer, attach
from preftree.model.shard import shard_base
from preftree.model.targets import all_linear
from preftree.model.weights import refuse_larger_tokenizer
from preftree.train.arguments import start_arguments
from preftree.train.budget import choose_budget, choose_shape
from preftree.train.flops import ModelFlops
from preftree.train.hpu import optimizer, step_hook
from preftree.train.inputs import EncodedSplits, Say, fingerprint, hub_options, prepare_pairs
from preftree.train.live import LiveLine, RunLog
from preftree.train.metrics import LiveMetrics
from preftree.train.profile import StepProfile
from preftree.train.reference import Reference
from preftree.train.step import Objective
from preftree.train.store import LogprobStore, scoring_key, weights_key
from preftree.train.trainer import PreferenceTrainer


def train(settings: Settings, console: Console | None = None) -> int:
    """Train as `settings` say; returns the process's exit code.

    Leaves in the output folder: the adapter, the tokenizer, trainer_state.json, checkpoints and `run/`.

    Raises:
        PreftreeError: whatever the user can fix, before anything is overwritten.
    """
    args = start_arguments(settings.train)
    console = console or Console(quiet=args.process_index != 0, soft_wrap=True)
    say: Say = sayer(console)
    folder, resume = RunFolder(settings.train.output_dir or ""), _checkpoint(settings)
    claim: dict[str, Any] = {
        "resume": resume is not None,
        "overwrite": settings.train.overwrite_output_dir,
        "fingerprint": settings.fingerprint(),
        "config": settings.as_dict(),
    }
    refuse_inside("--output_dir", settings.train.output_dir, settings.data.dataset_name)
    folder.check(**claim)  # before minutes of loading
    ranks = _ranks(settings.train.sharding, args, say)
    with ranks.explained("Start all ranks again; --resume_from_checkpoint true goes on from the last checkpoint."):
        device = choose_device("auto" if settings.train.use_habana else settings.train.device, str(args.device))
        dtype = choose_dtype(
            device.value, settings.model.torch_dtype, bf16=settings.train.bf16, fp16=settings.train.fp16
        )
        source = resolve(settings.model.model_name_or_path or "")
        say(f"device     {device}")
        say(f"precision  {dtype}")
        tokenizer = _tokenizer(settings, source)
        prepared = prepare_pairs(settings, tokenizer, console, say)
        if ranks.count > 1:  # every rank takes its share of the same steps
            ranks.check_same("pairs", fingerprint(prepared.train + prepared.validation))
        set_seed(settings.train.seed)
        scorer, key = _model(settings, source, dtype.value, device.value, ranks, say)
        refuse_larger_tokenizer(tokenizer, scorer.model, source.described)
        if device.value == "cpu":
            # From here on: what loading has freed is given back in any case.
            keep_freed_memory(settings.train.max_memory is None)
        reference = _reference(settings, scorer, key, ranks, say)
        trainer = _trainer(settings, reference, tokenizer, prepared, folder, args, console, say)
        if args.should_save:
            folder.claim(**claim)
            folder.write_env(environment())
        _run(trainer, resume, say)
    return 0


def _ranks(sharding: Sharding, args: TrainingArguments, say: Say) -> Ranks:
    """The processes of this run."""
    ranks = Ranks(args.ddp_timeout, kind_of(str(args.device)), lockstep=sharding.base)
    if ranks.count > 1:
        say(f"ranks      {ranks.count}: {sharding.reason}; LoRA's gradients are all-reduced once per step")
    elif sharding.base:
        say("ranks      one, so there is nothing to shard the base model over")
    return ranks


def _run(trainer: PreferenceTrainer, resume: str | None, say: Say) -> None:
    try:
        result = trainer.train(resume_from_checkpoint=resume)
        if trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
            trainer.evaluate()
    finally:  # a run that fails or is interrupted gives the terminal back and keeps what it has paid for
        trainer.reference.flush()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LiveLine):
                callback.close()
    trainer.save_model()
    trainer.save_state()
    seconds = result.metrics.get("train_runtime", 0.0)
    ranks, reference = trainer.ranks, trainer.reference
    computed, reused = (sum(counts) for counts in zip(*ranks.gather([reference.misses, reference.hits]), strict=True))
    say(
        f"trained    {trainer.state.global_step} steps in {seconds:.0f} s; reference: {computed} answers computed, "
        f"{reused} reused"
    )
    if ranks.count > 1:
        more = trainer.live_metrics.speed.imbalance(ranks.count)
        say(f"           the busiest rank of a step had {100 * more:.1f} % more tokens than the mean")
    last = next((record for record in reversed(trainer.state.log_history) if "eval_loss" in record), None)
    if last is not None:
        accuracy, margin = last["eval_rewards/accuracies"], last["eval_rewards/margins"]
        say(f"validation loss {last['eval_loss']:.4f}, accuracy {accuracy:.2f}, margin {margin:+.3f}")
    say(f"saved      {trainer.args.output_dir}: adapter, tokenizer, trainer_state.json, run/")


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


def _model(
    settings: Settings, source: ModelSource, dtype: Any, device: str, ranks: Ranks, say: Say
) -> tuple[Scorer, str]:
    """Load, put LoRA in, switch dropout off, shard, choose how the model is scored; also the weights' hash."""
    lora, sharding = settings.lora, settings.train.sharding
    model = load_model(source, dtype, **hub_options(settings))
    key = weights_key(model) if settings.train.reference_cache or ranks.count > 1 else ""
    ranks.check_same("weights of the model", key)
    if not ranks.lockstep:
        model.to(device)
    check_causal(model)
    dropout = 0.0 if settings.train.disable_dropout else lora.lora_dropout
    names = None if lora.lora_all_linear else lora.lora_target_modules
    config = lora_config(model, rank=lora.lora_rank, alpha=lora.lora_alpha, dropout=dropout, target_modules=names)
    targets = all_linear(model, dropout) if names is None else None
    peft = add_adapter(model, config, targets)
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    total = sum(p.numel() for p in peft.parameters())
    say(
        f"model      {source.described}: {type(model).__name__}, {total / 1e6:.0f} M weights, "
        f"LoRA trains {trained / 1e6:.2f} M"
    )
    for note in targets.notes() if targets is not None else ():
        say(f"           {note}")
    if settings.train.disable_dropout and (random := remove_randomness(peft)):
        say(
            f"dropout    off ({', '.join(random)}), so that policy and reference are the same function; "
            "--disable_dropout false keeps it"
        )
    if ranks.lockstep:
        say(f"sharded    {shard_base(peft, device, sharding.layers)}")
    scorer = attach(
        peft, settings.model.attention, fixed_shapes=settings.train.pad_max, room=room_for(settings.train.max_bytes)
    )
    what = "token trees, every prompt once" if scorer.shares_prompts else "single sequences, prompts not shared"
    say(f"attention  {scorer.name} ({what}): {scorer.reason}")
    return scorer, key


def _reference(settings: Settings, scorer: Scorer, key: str, ranks: Ranks, say: Say) -> Reference:
    if not settings.train.reference_cache:
        say("reference  the model without its adapter, kept in memory for this run (--reference_cache false)")
        return Reference(scorer, ranks=ranks)
    store = LogprobStore(cache_folder("reference") / scoring_key(key, scorer), say)
    say(f"reference  the model without its adapter; {len(store)} answers of these weights are in {cache_root()}")
    return Reference(scorer, store, ranks)


def _trainer(
    settings: Settings,
    reference: Reference,
    tokenizer: PreTrainedTokenizerBase,
    prepared: EncodedSplits,
    folder: RunFolder,
    args: TrainingArguments,
    console: Console,
    say: Say,
) -> PreferenceTrainer:
    train, ranks, scorer, device = settings.train, reference.ranks, reference.scorer, str(args.device)
    budget = choose_budget(
        scorer,
        prepared.train + prepared.validation,
        device=device,
        checkpointing=bool(args.activation_checkpointing),
        asked=train.tokens_per_forest,
        max_memory=train.max_bytes,
    )
    if ranks.count > 1:  # as the rank with the least memory can; all must recompute, or none
        everyones = ranks.gather([budget.tokens, budget.checkpointing])
        least, recompute = min(row[0] for row in everyones), any(row[1] for row in everyones)
        budget = replace(budget, tokens=least, checkpointing=recompute)
    args.activation_checkpointing = args.gradient_checkpointing = budget.checkpointing
    say(f"forests    of at most {budget.tokens} tokens: {budget.reason}")
    shape: Shape | None = None
    if train.pad_max:
        choice = choose_shape(budget.tokens, prepared.train + prepared.validation, train.pairs_per_step)
        shape = choice.value
        say(f"shape      {choice}")
    say(
        f"step       {ranks.count * train.pairs_per_step} pairs ({args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} x {ranks.count} ranks), loss {train.loss_type}, beta {train.beta:g}"
    )
    chosen = optimizer(args, device)
    if chosen.value is not None:
        say(f"optimizer  {chosen.reason}")
    flops = ModelFlops.of(scorer.causal, gemm_peak(device, scorer.causal.dtype, ready=product_with))
    live_metrics = LiveMetrics()
    trainer = PreferenceTrainer(
        scorer,
        args,
        train_pairs=prepared.train,
        eval_pairs=prepared.validation,
        reference=reference,
        objective=Objective(train.loss_type, train.beta, train.label_smoothing),
        budget=budget.tokens if shape is None else shape.tokens,
        shape=shape,
        tokenizer=tokenizer,
        live_metrics=live_metrics,
        hook=step_hook(train, device),
        optimizer=chosen.value,
        flops=flops,
        callbacks=[
            LiveLine(console, live_metrics, device, partial(flops.mfu, ranks=ranks.count)),
            RunLog(folder),
            *([StepProfile(console)] if train.profile else []),
        ],
        by_prompt=settings.data.pair_rule != "best_worst",
    )
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    return trainer
