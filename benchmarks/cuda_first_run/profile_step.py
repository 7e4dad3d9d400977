"""Step 4: where the time of one training step goes, by kind of kernel, and how long the card has nothing to do."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import cuda_shapes
import report
import shapes
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

#: Kinds by a part of a kernel's name, the first that fits.
KINDS = (
    ("attention", ("flash", "fmha", "flex_attention", "triton_tem", "varlen", "attention")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm",
                         "linear")),
    ("softmax, norms", ("softmax", "norm", "rsqrt", "logsumexp")),
    ("optimizer", ("multi_tensor", "adam", "foreach", "clip_grad")),
    ("copies, indexing", ("memcpy", "memset", "copy", "cat", "index", "gather", "scatter", "fill", "transpose")),
    ("fused by the compiler", ("triton_",)),
    ("elementwise, reductions", ("elementwise", "reduce", "aten::mul", "aten::add", "aten::silu", "aten::sum")),
)  # fmt: skip
OTHER = "other"
#: The step that is profiled: those before it have compiled kernels and made the optimizer's state.
STEP = 2


class OneStep(TrainerCallback):
    """Profiles step `STEP` of a run."""

    def __init__(self, device: str) -> None:
        self.device, self.started, self.wall, self.events = device, 0.0, 0.0, []
        self._running: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == STEP:
            device = [ProfilerActivity.CUDA] if self.device.startswith("cuda") else []
            self._synchronize()
            self._running = profile(activities=[ProfilerActivity.CPU, *device])
            self._running.start()
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._running is not None:
            self._synchronize()
            self.wall = time.perf_counter() - self.started
            self._running.stop()
            self.events, self._running = list(self._running.events() or []), None

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", required=True)
    parser.add_argument("--seconds", type=float, default=50)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    step = report.StepReport(Path(args.output) / "profile_step.json", args.seconds)
    shape = "tiny" if args.tiny else "llama-2-7b"
    watch = OneStep(args.device)
    model, pairs = shapes.make_model(shape, args.device), shapes.pairs_of(shape, 2 * cuda_shapes.STEP)
    with tempfile.TemporaryDirectory() as folder:
        run = cuda_shapes.run_preftree(model, pairs, folder, args.device, [watch])
    kernels = kernel_times(watch.events, args.device)
    busy = sum(kernels.values())
    kinds: dict[str, float] = defaultdict(float)
    for name, seconds in kernels.items():
        kinds[kind_of(name)] += seconds
    if args.device.startswith("cuda"):
        kinds["nothing to do"] = max(0.0, watch.wall - busy)
    total = sum(kinds.values()) or 1.0
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    step.put(
        shape=shape,
        setting=run["setting"],
        wall_ms=1000 * watch.wall,
        kinds={kind: {"ms": 1000 * seconds, "share": seconds / total} for kind, seconds in ordered},
        kernels={name: 1000 * kernels[name] for name in sorted(kernels, key=kernels.__getitem__, reverse=True)[:25]},
    )
    for kind, seconds in ordered:
        print(f"{kind:26}{1000 * seconds:9.1f} ms {seconds / total:6.1%}", flush=True)
    step.finish()
    return 0


def kernel_times(events: list[Any], device: str) -> dict[str, float]:
    """Seconds of each kernel on the card; on a CPU of each operation, without those that it calls."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if device.startswith("cuda"):
            if event.device_type == DeviceType.CUDA:
                seconds[event.name] += event.time_range.elapsed_us() / 1e6
        elif event.self_cpu_time_total > 0:
            seconds[event.name] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), OTHER)


if __name__ == "__main__":
    report.leave(main(sys.argv[1:]))
