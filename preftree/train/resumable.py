"""A Trainer that can be killed: sealed checkpoints, exact resume, signals, and no weights that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.errors import Stopped
from preftree.forest import Pair
from preftree.train import resume
from preftree.train.guard import FiniteGuard
from preftree.train.stop import StopOnSignal


class ResumableTrainer(Trainer):
    """What `DPOTrainer` is made resumable by; everything specific to steps and forests is there."""

    say: Callable[[str], None]
    identity: dict[str, Any]
    guard: FiniteGuard
    stopper: StopOnSignal

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`.

        Args:
            resume_from_checkpoint: a checkpoint folder of this run, or true for the newest whole one.

        Raises:
            RunError: the checkpoint is damaged or of another run; training has diverged.
            Stopped: a signal ended training; a checkpoint of the last step is there.
        """
        found = resume.choose_checkpoint(self, resume_from_checkpoint)  # type: ignore[arg-type]
        if found is not None:
            self.say(f"resume     from {found.path}")
        restore = RestoreProgress(self, found.path if found else None)
        self.add_callback(restore)
        try:
            result = super().train(str(found.path) if found else None, *args, **kwargs)
        finally:
            self.remove_callback(restore)
            self.stopper.restore()
        if self.stopper.received and self.state.global_step < self.state.max_steps:
            raise Stopped(self.stopper.received, self.state.global_step, str(self.args.output_dir))
        return result

    def _finite(self, loss: Tensor, trained: Sequence[nn.Parameter], pairs: Sequence[Pair]) -> bool:
        """May this step change the weights? (See `guard`.)"""
        return self.guard.allows(self.state.global_step + 1, loss, trained, pairs)

    def _mean_loss(self) -> Tensor:
        """Mean of the steps since the last log line, in the place of one that is not finite."""
        return self._tr_loss / max(1, self.state.global_step - self._globalstep_last_logged)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write `checkpoint-N`, whole or not at all; a disk that is full or gone does not end the run.

        Nothing is written while steps are skipped: it would push out checkpoints of before (`--save_total_limit`).
        """
        if self.guard.in_a_row:
            return
        try:
            resume.save_checkpoint(self)  # type: ignore[arg-type]
        except (OSError, SafetensorError, RuntimeError) as problem:  # torch's writer raises the last
            first = str(problem).strip().partition("\n")[0]
            self.say(
                f"WARNING    checkpoint-{self.state.global_step} could not be written ({first}); training goes on, and "
                "the checkpoints before it are unchanged"
            )


class RestoreProgress(TrainerCallback):
    """Puts sums back where a checkpoint had them: when Trainer has set its own to zero, and before the first step.

    Also where no step is left, as after a kill between the last checkpoint and the end.
    """

    def __init__(self, trainer: ResumableTrainer, checkpoint: Path | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if self.checkpoint is not None:
            resume.restore_progress(self.trainer, self.checkpoint)  # type: ignore[arg-type]
