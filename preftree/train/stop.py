"""SIGTERM, SIGINT and SIGHUP: the step is finished, a checkpoint is saved, and training ends.

The same command then goes on from that checkpoint. A second Ctrl-C does not wait for the step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.distributed.ranks import Ranks

#: SIGHUP is missing on Windows.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StopOnSignal(TrainerCallback):
    """Ends training in good order after a signal.

    Args:
        ranks: all of them stop at the same step, whichever was told.
        say: where the signal is acknowledged.
    """

    def __init__(self, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.ranks, self.say = ranks, say
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.received = 0
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            self._before = {each: signal.signal(each, self._receive) for each in SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.ranks.count > 1:
            self.received = max(row[0] for row in self.ranks.gather([self.received]))
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Put the handlers of before back; safe to call twice."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            self.restore()
            raise KeyboardInterrupt
        self.received = number
        again = "; once more to stop at once" if number == signal.SIGINT else ""
        self.say(f"{signal.Signals(number).name}: finishing this step, then saving a checkpoint{again}")
