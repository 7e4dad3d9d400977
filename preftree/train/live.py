"""What is seen while training: a row per log record, and below them a live line on a terminal."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.hardware.memory import peak_memory
from preftree.io.optional import OptionalWrites
from preftree.io.progress import clock
from preftree.io.run_folder import RunFolder
from preftree.train.metrics import LiveMetrics, SpeedMeter

#: Seconds between two lines where the output is no terminal.
QUIET_SECONDS = 30.0
#: Seconds between two updates of a live line: reading its numbers waits for the device.
LIVE_SECONDS = 0.5
_BARS = "▁▂▃▄▅▆▇█"


class LiveLine(TrainerCallback):
    """Step, loss, accuracy, margin, pairs per second, time left, and as the width allows tokens per second, share of
    prompt tokens saved, MFU and memory. Where the output is no terminal, a line now and then.

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
            f"{clock(left)} left",
            *(f"! {name.replace('_', ' ')}" for name in self.metrics.warnings),
            f"{rates['tokens_per_second']:.0f} tok/s",
            f"{100 * rates['tokens_saved']:.0f}% shared",
            f"{100 * self.mfu(self.metrics.speed):.0f}% MFU",
            f"{peak_memory(self.device) / 2**30:.1f} GiB",
        ]
        return Text(fitting(parts, self.console.width if self.console.is_terminal else None))


def fitting(parts: Sequence[str], width: int | None) -> str:
    """As many of the parts, in their order, as fit on a line of a terminal."""
    line = parts[0]
    for part in parts[1:]:
        if width is not None and len(line) + 2 + len(part) > width - 1:
            break
        line += f"  {part}"
    return line


class LogRows(TrainerCallback):
    """A row per log record and per evaluation, in aligned columns that stay on the screen.

    Args:
        console: where they are printed, above the live line.
    """

    #: Heading, key of the record, format.
    COLUMNS = (
        ("loss", "loss", ".4f"),
        ("accuracy", "rewards/accuracies", ".3f"),
        ("margin", "rewards/margins", "+.4f"),
        ("chosen", "rewards/chosen", "+.4f"),
        ("rejected", "rewards/rejected", "+.4f"),
    )

    def __init__(self, console: Console) -> None:
        self.console, self.headed = console, False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        logs = logs or {}
        prefix = "eval_" if "eval_loss" in logs else ""
        if not state.is_world_process_zero or f"{prefix}loss" not in logs:
            return
        if not self.headed:
            headings = "".join(f"{heading:>10}" for heading, _, _ in self.COLUMNS)
            self._print(f"{'step':>14}{headings}{'rate':>11}", "bold")
            self.headed = True
        values = "".join(_number(logs.get(f"{prefix}{key}"), form) for _, key, form in self.COLUMNS)
        rate = logs.get("learning_rate")
        what = "eval" if prefix else ""
        end = f"{rate:>11.2e}" if rate is not None else ""
        self._print(f"{what:>4}{state.global_step:>10}{values}{end}", "cyan" if prefix else "")

    def _print(self, line: str, style: str) -> None:
        self.console.print(Text(line, style=style), no_wrap=True, crop=False, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return f"{'' if value is None else format(value, form):>10}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The course of some numbers in one line, means of neighbours where there are more than `width`."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    if not count:
        return ""
    bounds = [len(finite) * i // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


class RunLog(TrainerCallback):
    """Every log record of Trainer, as a line of the run folder's metrics.

    Args:
        say: where it is told, once, that a record could not be written.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], object]) -> None:
        self.folder = folder
        self.write = OptionalWrites(say, "training goes on, and trainer_state.json will hold all records")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Begin with the records of the checkpoint that the run goes on from: later steps are logged again."""
        if state.is_world_process_zero:
            self._rewrite(state)

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
            self.write(self.folder.metrics_path, lambda: self.folder.log(record))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Write the records that could not be written, if there is room by now."""
        if state.is_world_process_zero and self.write.failed:
            self._rewrite(state)

    def _rewrite(self, state: TrainerState) -> None:
        records = [{"step": record["step"], **record} for record in state.log_history]
        self.write(self.folder.metrics_path, lambda: self.folder.reset_metrics(records))


def close_live_lines(callbacks: Iterable[TrainerCallback]) -> None:
    """Give the terminal back."""
    for callback in callbacks:
        if isinstance(callback, LiveLine):
            callback.close()
