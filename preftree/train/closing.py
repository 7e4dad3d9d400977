"""The end of a training run: what came out, where it is, and the exact commands that go on from there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from preftree.config.train import Settings
from preftree.errors import RunError
from preftree.hardware.memory import peak_memory
from preftree.io.console import Say, next_steps
from preftree.io.progress import amount, clock
from preftree.io.run_folder import free_space
from preftree.publish.card import run_card, wilson
from preftree.publish.hub import hub_repository, upload
from preftree.train.live import sparkline
from preftree.train.trainer import DPOTrainer


def check_room(trainer: DPOTrainer, say: Say) -> None:
    """Find out before the first step whether the disk has room for what training saves.

    Raises:
        RunError: not even one checkpoint fits.
    """
    args = trainer.args
    if not args.should_save:
        return
    free = free_space(args.output_dir or ".")
    # An adapter or model, and what most optimizers keep of each of its weights: two moments in float32.
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    moments = sum(8 * p.numel() for p in trainer.model.parameters() if p.requires_grad)
    kept = 0 if args.save_strategy == "no" else args.save_total_limit or _saves(trainer)
    needed = weights + max(1, kept) * (weights + (0 if args.save_only_model else moments))
    if free < weights + (weights + moments if kept else 0):
        raise RunError(
            f"--output_dir {args.output_dir}: there are {amount(free)} free, too little for one checkpoint and the "
            f"result ({amount(2 * weights + moments)}). Make room, or give a folder on another disk."
        )
    if free < needed:
        say(f"note       checkpoints need up to {amount(needed)}, and {amount(free)} are free: see --save_total_limit")


def _saves(trainer: DPOTrainer) -> int:
    """How many checkpoints training writes, about."""
    args = trainer.args
    data = trainer.train_dataset
    steps = args.max_steps
    if steps <= 0:
        steps = int(args.num_train_epochs * len(data) / max(1, args.pairs_per_step)) if hasattr(data, "__len__") else 0
    if args.save_strategy == "epoch":
        return int(args.num_train_epochs) + 1
    every = args.save_steps if args.save_steps >= 1 else max(1.0, args.save_steps * steps)
    return max(1, int(steps / every))


def close(trainer: DPOTrainer, settings: Settings | None, seconds: float, say: Say) -> None:
    """Write the model card, say what came out, upload where that was asked for, and name the next commands."""
    folder = Path(trainer.args.output_dir or ".")
    _tell_results(trainer, seconds, say)
    if not trainer.args.should_save:
        return
    run_card(folder).save(folder / "README.md")
    say(f"saved      {folder}: adapter, tokenizer, model card (README.md), trainer_state.json, run/")
    if trainer.args.push_to_hub:
        args = trainer.args
        repository, private = hub_repository(args.hub_model_id, folder), bool(args.hub_private_repo)
        say(f"pushed     {upload(repository, folder, private=private, token=args.hub_token)}")
    if settings is not None:
        next_steps(say, *next_commands(str(folder), settings.model.model_name_or_path or ""))


def next_commands(output_dir: str, model: str) -> list[str]:
    """What to do with a trained adapter."""
    run, base = shlex.quote(output_dir), shlex.quote(model)
    return [
        f"preftree chat {run}",
        f"preftree samples {run}",
        f"preftree report {run}",
        f"preftree evaluate --model {base} --adapter {run} --out {shlex.quote(f'{output_dir}-scores')}",
        f"preftree merge {run} --out {shlex.quote(f'{output_dir}-merged')}",
    ]


def _tell_results(trainer: DPOTrainer, seconds: float, say: Say) -> None:
    """Time, memory, the course of the loss, and the held-out pairs. All ranks call it; what is counted is gathered."""
    counts = _reference_counts(trainer)
    memory = max(row[0] for row in trainer.ranks.gather([peak_memory(str(trainer.args.device))]))
    say(f"trained    {trainer.state.global_step} steps in {clock(seconds)}, peak memory {amount(memory)}{counts}")
    if trainer.ranks.count > 1:
        more = trainer.live_metrics.speed.imbalance(trainer.ranks.count)
        say(f"           the busiest rank of a step had {100 * more:.1f} % more tokens than the mean")
    history = trainer.state.log_history
    losses = [float(record["loss"]) for record in history if "loss" in record]
    if len(losses) > 1:
        say(f"loss       {sparkline(losses)}  {losses[0]:.4f} to {losses[-1]:.4f}")
    last = next((record for record in reversed(history) if "eval_loss" in record), None)
    if last is not None:
        say(f"held out   {_heldout(last, _pairs_of(trainer))}")


def _heldout(record: dict[str, float], pairs: int) -> str:
    accuracy = record["eval_rewards/accuracies"]
    interval = ""
    if pairs:
        low, high = wilson(accuracy, pairs)
        interval = f" (95 % interval {low:.2f} to {high:.2f}, {pairs} pairs)"
    margin, loss = record["eval_rewards/margins"], record["eval_loss"]
    return f"accuracy {accuracy:.2f}{interval}, margin {margin:+.3f}, loss {loss:.4f}"


def _pairs_of(trainer: DPOTrainer) -> int:
    data = trainer.eval_dataset
    return len(data) if hasattr(data, "__len__") and not isinstance(data, dict) else 0


def _reference_counts(trainer: DPOTrainer) -> str:
    reference = trainer.reference
    if reference is None:
        return ""
    counts: Sequence[Sequence[int]] = trainer.ranks.gather([reference.misses, reference.hits])
    computed, reused = (sum(column) for column in zip(*counts, strict=True))
    return f"; reference: {computed} answers computed, {reused} reused"
