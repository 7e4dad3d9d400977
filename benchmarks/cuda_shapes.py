"""The GPU half of `train_vs_trl.py`: random weights in the shapes of real models, token ids of Orca pairs' lengths.

    python benchmarks/train_vs_trl.py --device cuda            # three shapes, both sides, under 8 minutes on an H100

Nothing is downloaded: models are made from their configs, in bfloat16 on the device. LoRA r=16 on every linear layer,
8 pairs an optimizer step (the original recipe's 1 x 8). Each side runs in a fresh process. TRL's is searched first:
every number of pairs at once, without and with checkpointing, as far as memory goes, one step of each; the fastest is
timed. Of both, the first step (set-up, compilation) is left out, the reference pass is counted. preftree's second
epoch, whose reference is remembered, is given beside. A side that fails is reported, and the others still run.

Where preftree is not installed: PYTHONPATH=. before the command. Its side needs torch, transformers, peft, accelerate
and what they need; TRL's also trl, datasets, dill, multiprocess, pandas, pyarrow, python-dateutil, tzdata, xxhash. Of
several GPUs the first is used, for Trainer would copy the model to all of them; CUDA_VISIBLE_DEVICES names another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shapes import SHAPES, Ids, make_model, pairs_of
from side_by_side import answer, fresh_process

SIDES = ("preftree", "trl")
STEP = 8


def arguments(folder: str, steps: int, device: str) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "seed": 0,
    }


def clock(device: str) -> Any:
    """A trainer callback that keeps when each step ended, once the device is done with it."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if device != "cpu":
                torch.accelerator.synchronize()
            self.ends.append(time.perf_counter())

        def seconds(self, first: int, last: int) -> float:
            """Of the steps after number `first` up to number `last`, counted from 1."""
            return self.ends[last - 1] - self.ends[first - 1]

    return Clock()


def forget_peak(device: str) -> None:
    """Count the most memory from here on, so that it is training's; on a CPU it is the whole process's."""
    import torch

    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()


def run_preftree(
    model: Any, pairs: list[Ids], folder: str, device: str, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Two epochs: the reference is computed in the first and remembered in the second."""
    from rich.console import Console
    from transformers import PrinterCallback

    from preftree.train.arguments import recomputes
    from preftree.train.config import DPOConfig
    from preftree.train.trainer import DPOTrainer

    steps, watch = len(pairs) // STEP, clock(device)
    config = DPOConfig(
        **arguments(folder, 2 * steps, device),
        per_device_train_batch_size=STEP,
        reference_cache=False,
        max_length=None,
        bf16=False,  # the weights say in what is computed
    )
    rows = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
        for p in pairs
    ]
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=rows,
        processing_class=_tokenizer(model.config.vocab_size),
        callbacks=[watch, *callbacks],
        console=Console(quiet=True),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    scorer = trainer.scorer
    return {
        "seconds": watch.seconds(1, steps),
        "seconds_cached": watch.seconds(steps, 2 * steps) * (steps - 1) / steps,
        "setting": f"{scorer.name}, forests of {trainer.step.budget} tokens"
        f"{', activations recomputed' if recomputes(trainer.args) else ''}",
        "attention": scorer.reason,
    }


@dataclass(frozen=True)
class TrlSetting:
    """How TRL computes a step of `STEP` pairs; its head never holds all logits in any of them."""

    batch: int
    checkpointing: bool = False
    liger: bool = False

    def __str__(self) -> str:
        return (
            f"pairs of {self.batch}, {'' if self.checkpointing else 'no '}checkpointing"
            f"{', use_liger_kernel' if self.liger else ''}"
        )


def run_trl(model: Any, pairs: list[Ids], folder: str, device: str, left: Callable[[], float]) -> dict[str, Any]:
    """The fastest of TRL's settings, each tried for one step after one to set up.

    Args:
        left: seconds until an answer is due; a search that is cut short says so.
    """
    tried, refused = _search(model, pairs, folder, device, left)
    if not tried:
        return {"seconds": float("nan"), "setting": "out of memory in every setting"}
    best = min(tried, key=tried.__getitem__)
    forget_peak(device)
    return {
        "seconds": _trl(model, pairs, folder, device, best),
        "setting": f"{best}{f' ({refused})' if refused else ''}",
        "tried": {str(setting): taken for setting, taken in tried.items()},
    }


def _search(
    model: Any, pairs: list[Ids], folder: str, device: str, left: Callable[[], float]
) -> tuple[dict[TrlSetting, float], str]:
    """Seconds of a step in every setting that fits into memory, and why some were not tried."""
    import torch

    tried: dict[TrlSetting, float] = {}
    longest = 0.0

    def attempt(setting: TrlSetting) -> float:
        start = time.perf_counter()
        try:
            tried[setting] = _trl(model, pairs[: 2 * STEP], folder, device, setting)
        except torch.OutOfMemoryError:
            pass
        finally:
            _release(model, device)
        return time.perf_counter() - start

    # Recomputing costs time: it is tried with the numbers of pairs that do not fit without it.
    for checkpointing in (False, True):
        for batch in (8, 4, 2, 1):
            if TrlSetting(batch) in tried:
                continue
            # The timed run takes as long as an attempt for each two of its steps.
            if tried and left() < longest * (1 + len(pairs) / (2 * STEP)):
                return tried, "search cut short"
            longest = max(longest, attempt(TrlSetting(batch, checkpointing)))
    if tried and _takes_liger(model):  # last, as it patches the model for good
        try:
            attempt(replace(min(tried, key=tried.__getitem__), liger=True))
        except Exception as problem:  # its kernels may be for another version of transformers
            return tried, f"use_liger_kernel failed: {type(problem).__name__}: {problem}"[:200]
    return tried, ""


def _takes_liger(model: Any) -> bool:
    from importlib.util import find_spec

    return find_spec("liger_kernel") is not None and model.config.model_type == "llama" and model.device.type != "cpu"


def _trl(model: Any, pairs: list[Ids], folder: str, device: str, setting: TrlSetting) -> float:
    """Seconds of all steps but the first."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """Takes token ids as they are."""

        def _prepare_dataset(self, dataset: Any, *others: Any, **more: Any) -> Any:
            return dataset

    steps, watch = len(pairs) // STEP, clock(device)
    config = DPOConfig(
        **arguments(folder, steps, device),
        per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=STEP // setting.batch,
        gradient_checkpointing=setting.checkpointing,
        use_liger_kernel=setting.liger,
        max_length=None,
        bf16=device != "cpu",
    )
    rows = [
        {name: list(getattr(pair, name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs
    ]
    trainer = Tokenized(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(model.config.vocab_size),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return float(watch.seconds(1, steps))


def _release(model: Any, device: str) -> None:
    """Undo what an attempt left: its copy of the adapter for the reference, recomputation, and its memory."""
    import gc

    import torch

    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    # Trainer switches it on and never off: attempts without it that come later would recompute as well.
    inner = model.get_base_model()
    getattr(inner, "activation_checkpointing_disable", inner.gradient_checkpointing_disable)()
    # The hooks that made inputs require gradients; transformers' own way to remove them knows only the last one.
    inner.get_input_embeddings()._forward_hooks.clear()
    model.zero_grad()
    gc.collect()
    if device != "cpu":
        torch.accelerator.empty_cache()


def _tokenizer(vocabulary: int) -> Any:
    """TRL asks for one, and here takes nothing from it but the padding id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def useful_flops(model: Any, pairs: list[Ids]) -> float:
    """Arithmetic of one epoch that no exact method can leave out (see `train_vs_trl.py`), the reference included."""
    inner = model.get_base_model()
    tables = {id(m): m.weight.numel() for m in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    weights = {id(p): p.numel() for n, p in inner.named_parameters() if "lora_" not in n and p.dim() == 2}
    embeddings = {id(m.weight) for m in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    body = sum(count for key, count in weights.items() if key not in embeddings)
    head = tables[id(inner.get_output_embeddings())]
    scored = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    tree = scored + sum(len(p.prompt_ids) for p in pairs)
    return 6.0 * body * tree + 6.0 * head * scored


def gemm_peak(device: str) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    import torch

    size, dtype = (512, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(shape: str, side: str, device: str, steps: int, seconds: float = float("inf")) -> dict[str, Any]:
    """One side on one shape, in this process, within `seconds` as far as its search can be cut short."""
    from preftree.hardware.memory import peak_memory

    start = time.perf_counter()
    peak = gemm_peak(device)
    model, pairs = make_model(shape, device), pairs_of(shape, STEP * steps)
    forget_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        if side == "preftree":
            found = run_preftree(model, pairs, folder, device)
        else:
            found = run_trl(model, pairs, folder, device, lambda: start + seconds - time.perf_counter())
    timed = pairs[STEP:]
    result = {
        **found,
        "pairs_per_second": len(timed) / found["seconds"],
        "mfu": useful_flops(model, timed) / found["seconds"] / peak,
        "peak_gib": peak_memory(device) / 2**30,
        "gemm_peak_tflops": peak / 1e12,
    }
    if "seconds_cached" in found:
        result["pairs_per_second_cached"] = len(timed) / found["seconds_cached"]
    return result


def main(argv: list[str]) -> int:
    """Run all shapes and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-2-7b", "mpt-7b"], choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=6, help=f"steps of {STEP} pairs; the first is not timed")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--child", nargs=2, metavar=("SHAPE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}: the first one is not timed")
    if args.child:
        answer(measure(*args.child, args.device, args.steps))
        return 0
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for shape in args.shapes:
        for side in SIDES:
            results.setdefault(shape, {})[side] = _fresh(shape, side, args)
            if args.json:  # after each: time on a machine with a GPU may end early
                _keep(results, Path(args.json))
    whole = {shape: sides for shape, sides in results.items() if not any("failed" in found for found in sides.values())}
    if whole:
        print(table(whole))
    return 0 if whole.keys() == results.keys() else 1


def _keep(results: dict[str, dict[str, dict[str, Any]]], file: Path) -> None:
    from preftree.hardware.environment import environment

    file.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")


def _fresh(shape: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    command = [__file__, "--device", args.device, "--steps", str(args.steps), "--child", shape, side]
    try:
        found = fresh_process(command, f"{shape}, {side}:")
    except SystemExit as failure:
        print(failure, flush=True)
        return {"failed": str(failure)}
    print(f"{shape:14}{side:10}{found['pairs_per_second']:8.2f} pairs/s  ({time.perf_counter() - start:.0f} s)  "
          f"{found['setting']}", flush=True)  # fmt: skip
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Both sides of each shape, and their ratios."""
    lines = ["", f"{'':14}{'':10}{'pairs/s':>9}{'cached':>9}{'peak GiB':>10}{'mfu':>13}"]
    for shape, sides in results.items():
        for side, found in sides.items():
            cached = f"{found['pairs_per_second_cached']:.2f}" if "pairs_per_second_cached" in found else ""
            lines.append(
                f"{shape:14}{side:10}{found['pairs_per_second']:9.2f}{cached:>9}{found['peak_gib']:10.1f}"
                f"{100 * found['mfu']:12.0f}%"
            )
        ours, theirs = (sides[side] for side in SIDES)
        speed, memory = (a[key] / b[key] for a, b, key in
                         ((ours, theirs, "pairs_per_second"), (ours, theirs, "peak_gib")))  # fmt: skip
        lines.append(f"{'':14}{'ratio':10}{speed:9.2f}{'':9}{memory:10.2f}")
    peak = statistics.median(found["gemm_peak_tflops"] for sides in results.values() for found in sides.values())
    return "\n".join([*lines, f"GEMM peak {peak:.1f} TFLOP/s; mfu is useful arithmetic over it"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
