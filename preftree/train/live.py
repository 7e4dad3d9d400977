"""What is seen while training: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.hardware.memory import peak_memory
from preftree.io.progress import clock
from preftree.io.run_folder import RunFolder
from preftree.train.metrics import LiveMetrics, SpeedMeter

#: Seconds between two lines where the output is no terminal.
QUIET_SECONDS = 10.0
#: Seconds between two updates of a live line: reading its numbers waits for the device.
LIVE_SECONDS = 0.5


class LiveLine(TrainerCallback):
    """Step, loss, accuracy, margin, rates, share of prompt tokens saved, MFU, memory and time left.

    Args:
        mfu: model FLOPs utilisation over the steps of a meter.
    """

    def __init__(self, console: Console, metrics: LiveMetrics, device: str, mfu: Callable[[SpeedMeter], float]) -> None:
        self.console, self.metrics, self.device, self.mfu = console, metrics, device, mfu
        self.live: Live | None = None
        self.started = time.perf_counter()
        self.first_step = 0
        self.printed = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        self.metrics.speed.started = self.started
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        now = time.perf_counter()
        pause = QUIET_SECONDS if self.live is None else LIVE_SECONDS
        if now - self.printed >= pause or state.global_step == state.max_steps:
            (self.console.print if self.live is None else self.live.update)(self.line(state))
            self.printed = now

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def line(self, state: TrainerState) -> Text:
        """The line itself, for a state after at least one step."""
        values, rates = self.metrics.step.means(), self.metrics.speed.rates()
        done = max(state.global_step - self.first_step, 1)
        left = (state.max_steps - state.global_step) * (time.perf_counter() - self.started) / done
        parts = [
            f"step {state.global_step}/{state.max_steps}",
            f"loss {values.get('loss', math.nan):.4f}",
            f"acc {values.get('rewards/accuracies', math.nan):.2f}",
            f"margin {values.get('rewards/margins', math.nan):+.3f}",
            f"{rates['pairs_per_second']:.2f} pairs/s",
            f"{rates['tokens_per_second']:.0f} tok/s",
            f"{100 * rates['tokens_saved']:.0f}% shared",
            f"{100 * self.mfu(self.metrics.speed):.0f}% MFU",
            f"{peak_memory(self.device) / 2**30:.1f} GiB",
            f"{clock(left)} left",
            *(f"! {name.replace('_', ' ')}" for name in self.metrics.warnings),
        ]
        return Text("  ".join(parts))


class RunLog(TrainerCallback):
    """Every log record of Trainer, as a line of the run folder's metrics.

    Args:
        say: where it is told, once, that a record could not be written.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], object]) -> None:
        self.folder, self.say, self.failed = folder, say, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Begin with the records of the checkpoint that the run goes on from: later steps are logged again."""
        if state.is_world_process_zero:
            records = [{"step": record["step"], **record} for record in state.log_history]
            self._write(lambda: self.folder.reset_metrics(records))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            record = {"step": state.global_step, **logs}
            self._write(lambda: self.folder.log(record))

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as problem:
            if not self.failed:
                self.say(
                    f"WARNING    {self.folder.metrics_path} cannot be written ({problem.strerror or problem}); "
                    "training goes on, and trainer_state.json will hold all records"
                )
            self.failed = True
