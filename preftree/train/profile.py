"""Where a step's time goes, by kind of layer: `preftree train --profile true`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: The step that is profiled: the one before it has filled caches and made the optimizer's state.
STEP = 1
#: Kinds by a part of the name of an operation or of one that called it, the first that fits.
KINDS = (
    ("head", ("FusedLogprobs",)),
    ("attention", ("KernelAttention", "TileAttention", "scaled_dot_product", "flex_attention", "softmax", "bmm")),
    ("projections with LoRA", ("LoraLinear",)),
    ("optimizer", ("Optimizer.step", "clip_grad", "foreach")),
    ("norms, activations", ("RmsNorm", "Swiglu", "silu", "gelu", "rsqrt", "pow", "mean", "native_layer_norm")),
    ("projections", ("_linear_pointwise", "aten::mm", "aten::addmm", "aten::linear", "aten::matmul")),
    ("copies", ("copy_", "cat", "contiguous", "clone", "fill_", "zero_", "index", "gather", "scatter")),
    ("elementwise", ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::sum", "aten::exp")),
)
OTHER = "Python and the rest"


class StepProfile(TrainerCallback):
    """Profiles the second step and prints its table. A profiled step is a little slower than others."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.running: profile | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if state.global_step == STEP:
            kind = args.device.type.upper()
            device = [getattr(ProfilerActivity, kind)] if kind in ("CUDA", "XPU") else []
            self.running = profile(activities=[ProfilerActivity.CPU, *device])
            self.running.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.running is not None:
            self.running.stop()
            events, self.running = self.running.events(), None
            self.console.print(table(by_kind(events or [])))


def by_kind(events: list[FunctionEvent]) -> dict[str, float]:
    """Seconds by kind, most first: each operation's own time, without that of operations it calls."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        own = getattr(event, "self_device_time_total", 0) or event.self_cpu_time_total
        seconds[kind_of(event)] += own / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def kind_of(event: FunctionEvent) -> str:
    """The kind of an operation; what runs inside an attention or a head belongs to that, whatever it is."""
    names = []
    caller: FunctionEvent | None = event
    while caller is not None:
        names.append(caller.name)
        caller = caller.cpu_parent
    for kind, parts in KINDS:
        reach = names if kind in ("head", "attention", "projections with LoRA", "optimizer") else names[:1]
        if any(part in name for name in reach for part in parts):
            return kind
    return OTHER


def table(seconds: dict[str, float]) -> Table:
    """What is printed."""
    total = sum(seconds.values()) or 1.0
    out = Table("kind of layer", "seconds", "share", title="one step", title_justify="left")
    for column in out.columns[1:]:
        column.justify = "right"
    for kind, spent in seconds.items():
        out.add_row(kind, f"{spent:.2f}", f"{100 * spent / total:.1f} %")
    return out
