"""Exact resume: what Trainer leaves out of a checkpoint, and how a checkpoint is written, chosen and refused.

Bit-identical on a CPU with a fixed number of threads. Adapter, optimizer, schedule and random state are Trainer's own
files; added are the sums of the logging window that is not over yet, the size of forests (`PROGRESS`), and reference
log-probs that no cache holds (`REFERENCE`). A checkpoint is sealed (`checkpoint`) and carries the identity of its run.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_model, save_model
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import ExportableState

from preftree.errors import RunError
from preftree.io.atomic import write_json
from preftree.io.jsonl import to_json
from preftree.io.run_folder import fact_differences, listed
from preftree.train.checkpoint import Checkpoint, newest, prune, sealed_folder
from preftree.train.identity import adapter_fact, data_fact, settings_facts, tokenizer_fact
from preftree.train.metrics import PairMeter, SpeedMeter
from preftree.train.store import LogprobStore

if TYPE_CHECKING:
    from preftree.train.trainer import DPOTrainer

IDENTITY = "identity.json"
PROGRESS = "progress.json"
REFERENCE = "reference"
REFERENCE_MODEL = "reference_model.safetensors"


def identity_of(trainer: DPOTrainer, weights: str) -> dict[str, Any]:
    """The facts that make a trainer's run.

    Args:
        weights: hash of the model's weights before training.
    """
    sets: dict[str, Any] = {"training pairs": trainer.train_dataset}
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        sets |= {f"validation pairs {name!r}": each for name, each in evaluation.items()}
    elif evaluation is not None:
        sets["validation pairs"] = evaluation
    facts: dict[str, Any] = {
        **settings_facts(trainer.args, trainer.ranks.count),
        "model weights": weights,
        "precision": str(trainer.scorer.causal.dtype).removeprefix("torch."),
        **{name: data_fact(each.pairs) for name, each in sets.items() if hasattr(each, "pairs")},
    }
    if isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        facts["tokenizer"] = tokenizer_fact(trainer.processing_class)
    if configs := getattr(trainer.model, "peft_config", None):
        facts["adapter"] = adapter_fact(configs)
    return facts


def choose_checkpoint(trainer: DPOTrainer, asked: str | bool | None) -> Checkpoint | None:
    """The checkpoint to go on from; None to start at the first step.

    Args:
        asked: a folder, or true for the newest whole one of the output folder.

    Raises:
        RunError: it is damaged, or of another run; with what is wrong or differs.
    """
    if not asked:
        return None
    if asked is True:
        found = newest(Path(trainer.args.output_dir or "."), trainer.say)
    else:
        found = Checkpoint(0, Path(str(asked)))
        if faults := found.faults():
            raise RunError(f"--resume_from_checkpoint {asked} cannot be used: {'; '.join(faults[:3])}.")
    if found is not None:
        check_identity(trainer.identity, found.path / IDENTITY, str(found.path))
    return found


def check_identity(identity: dict[str, Any], path: Path, place: str) -> None:
    """Raise RunError with all differences unless the identity kept in `path` is this one."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{place} does not say what run it is of ({path.name} is missing or damaged).") from None
    if differing := fact_differences(earlier, to_json(identity)):
        raise RunError(
            f"{place} is of another run:{listed(differing)}\nRepeat what it began with, or start anew elsewhere."
        )


# --- Writing ---


def save_checkpoint(trainer: DPOTrainer) -> None:
    """Write `checkpoint-N` of the current step. All ranks call it; the first one writes.

    Raises:
        OSError, SafetensorError, RuntimeError: the disk is full or gone; earlier checkpoints are as they were.
    """
    if trainer.reference is not None:
        trainer.reference.flush()  # else answers would be computed again in other forests, with other rounding
    states = trainer.ranks.gather_bytes(_rng_state(trainer))
    if not trainer.args.should_save:
        return
    output, state = Path(trainer.args.output_dir or "."), trainer.state
    with sealed_folder(output, state.global_step) as folder:
        trainer.save_model(str(folder), _internal_call=True)
        if not trainer.args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_scaler(str(folder))
            for rank, content in enumerate(states):
                name = "rng_state.pth" if len(states) == 1 else f"rng_state_{rank}.pth"
                (folder / name).write_bytes(content.numpy().tobytes())
            _save_reference(trainer, folder)
        write_json(folder / PROGRESS, progress_of(trainer))
        write_json(folder / IDENTITY, trainer.identity)
        _save_state(trainer, folder)
    best = f"checkpoint-{state.best_global_step}" if state.best_global_step else None
    prune(output, trainer.args.save_total_limit, output / best if best and (output / best).is_dir() else None)


def _rng_state(trainer: DPOTrainer) -> torch.Tensor:
    """This rank's random state as Trainer writes it, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer._save_rng_state(folder)
        (path,) = Path(folder).iterdir()
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _save_reference(trainer: DPOTrainer, folder: Path) -> None:
    reference = trainer.reference
    if reference is None:
        return
    if reference.store is None and not reference.model.moving:
        store = LogprobStore(folder / REFERENCE)
        for key, token_S in reference.answers().items():
            store.add(key, token_S)
        store.flush()
    if reference.model.moving and trainer.ref_model is not None:
        save_model(trainer.ref_model, str(folder / REFERENCE_MODEL))


def _save_state(trainer: DPOTrainer, folder: Path) -> None:
    """Trainer's own state, with that of callbacks, and where the best checkpoint is."""
    state = trainer.state
    if state.best_global_step:
        best = Path(trainer.args.output_dir or ".") / f"checkpoint-{state.best_global_step}"
        if best.is_dir() or state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(best)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()
    state.save_to_json(os.path.join(folder, "trainer_state.json"))


# --- Reading ---


def progress_of(trainer: DPOTrainer) -> dict[str, Any]:
    """What a step adds to beside weights and random state; floats survive JSON to the bit."""
    return {
        "step_loss": trainer._tr_loss.item(),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "tokens": trainer._tokens,
        "window_pairs": trainer.since_log.pairs,
        "window": trainer.since_log.total.tolist(),
        "speed": trainer.speed.counts(),
        "tokens_per_forest": trainer.step.budget,
    }


#: What `progress_of` keeps.
_KEPT = {
    "step_loss", "total_loss", "last_logged", "tokens", "window_pairs", "window", "speed", "tokens_per_forest",
}  # fmt: skip


def restore_progress(trainer: DPOTrainer, folder: Path) -> None:
    """Go on where `progress_of` was taken; called when Trainer has set its own sums to zero."""
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        missing = _KEPT - progress.keys()
    except (OSError, ValueError, AttributeError):
        missing = _KEPT
    if missing:
        raise RunError(
            f"{folder / PROGRESS} lacks {', '.join(sorted(missing)[:4])}: the checkpoint is of another version of "
            "preftree. Go on from it with that version, or start anew elsewhere."
        )
    trainer._tr_loss = torch.full_like(trainer._tr_loss, progress["step_loss"])
    trainer._total_loss_scalar = progress["total_loss"]
    trainer._globalstep_last_logged = progress["last_logged"]
    trainer._tokens = progress["tokens"]
    trainer.since_log = PairMeter.on(trainer.args.device)  # in its own precision: the sums must survive to the bit
    window = progress["window"]  # of an earlier version it may have fewer sums
    trainer.since_log.total[: len(window)] = trainer.since_log.total.new_tensor(window)
    trainer.since_log.pairs = progress["window_pairs"]
    trainer.speed = SpeedMeter(*progress["speed"])
    _restore_budget(trainer, progress["tokens_per_forest"])
    _restore_reference(trainer, folder)


def _restore_budget(trainer: DPOTrainer, tokens: int) -> None:
    """Forests as large as before, since their size decides how sums are rounded; never larger than memory allows."""
    now = trainer.step.budget
    if tokens <= now:
        trainer.step.budget = tokens
    elif trainer.args.tokens_per_forest is None:
        trainer.say(
            f"note       forests had up to {tokens} tokens before and have {now} now, as there is less memory: "
            "the same objective, but rounding differs"
        )


def _restore_reference(trainer: DPOTrainer, folder: Path) -> None:
    reference = trainer.reference
    if reference is None:
        return
    if (folder / REFERENCE).is_dir():
        reference.learn(LogprobStore(folder / REFERENCE))
    if (folder / REFERENCE_MODEL).is_file() and trainer.ref_model is not None:
        load_model(trainer.ref_model, folder / REFERENCE_MODEL)
        reference.forget()
