"""preftree beside TRL's DPOTrainer: same weights, token ids, order, LoRA start and pairs per optimizer step.

    python benchmarks/train_vs_trl.py [--pairs 16] [--rounds 3] [--trl_batch 1]

The two alternate in fresh processes, one after the other, so that a machine that drifts drifts for both. TRL runs in
the setting that is fastest for it on the machine (its fused head, no checkpointing, `--trl_batch` pairs a forward).
Timed is everything after the model is loaded and the data tokenized, the reference pass included. Printed: pairs/s
of both, their ratio round by round (min, median, max), peak memory while training, the share of the machine's GEMM
peak that useful arithmetic takes, and the losses of both. `--json FILE` keeps all of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import PeakMemory, answer, fresh_process

SIDES = ("preftree", "trl")
DATA = Path(__file__).parent / "data" / "orca_pairs.jsonl"


def main() -> int:
    if _wants_shapes(sys.argv[1:]):
        import cuda_shapes

        return cuda_shapes.main(sys.argv[1:])
    args = _arguments()
    if args.child:
        answer(_child(args))
        return 0
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            found = fresh_process([__file__, *sys.argv[1:], "--child", side], side)
            results[side].append(found)
            print(
                f"round {number + 1}/{args.rounds} {side:9} {found['pairs_per_second']:.4f} pairs/s  "
                f"{found['peak_gib']:.2f} GiB  loss {found['losses'][0]:.4f} … {found['losses'][-1]:.4f}",
                flush=True,
            )
    report = _report(args, results)
    print(report["table"])
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _wants_shapes(argv: list[str]) -> bool:
    """A GPU and no model of one's own: shapes of large models with random weights (`cuda_shapes.py`)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model")
    known, _ = parser.parse_known_args(argv)
    return known.device.partition(":")[0] == "cuda" and known.model is None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--data", default=str(DATA), help="preference data (%(default)s)")
    add("--pairs", type=int, default=16, help="pairs of the run, taken evenly from the file (%(default)s)")
    add("--step", type=int, default=4, help="pairs of one optimizer step (%(default)s)")
    add("--trl_batch", type=int, default=2, help="pairs TRL computes at once (%(default)s)")
    add("--epochs", type=int, default=1)
    add("--rounds", type=int, default=3)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--device", default="cpu")
    add("--full", action="store_true", help="full fine-tuning in place of LoRA")
    add("--trl_precompute", action="store_true", help="full fine-tuning: TRL computes its reference before training")
    add("--all_linear", action="store_true", help="LoRA on every linear layer, not only q, k and v")
    add("--rank", type=int, default=16)
    add("--max_length", type=int, default=1024)
    add("--max_prompt_length", type=int, default=512)
    add("--learning_rate", type=float, default=5e-4)
    add("--json", help="file for all numbers")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from preftree.data.encode import encode_pairs
    from preftree.data.sources import load_pairs
    from preftree.hardware.device import gemm_peak
    from preftree.hardware.precision import cpu_bf16_instructions
    from preftree.model.cpu.linear import product_with
    from preftree.model.determinism import remove_randomness
    from preftree.model.load import load_model, load_tokenizer, resolve
    from preftree.model.lora import add_lora
    from preftree.train.flops import ModelFlops

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(args.dtype)
    if dtype is None:
        fast = args.device != "cpu" or cpu_bf16_instructions()
        dtype = torch.bfloat16 if fast else torch.float32
    source = resolve(args.model)
    tokenizer = load_tokenizer(source)
    pairs, _ = encode_pairs(
        load_pairs(args.data), tokenizer, max_length=args.max_length, max_prompt_length=args.max_prompt_length
    )
    pairs = pairs[:: max(1, len(pairs) // args.pairs)][: args.pairs]
    model = load_model(source, dtype).to(args.device)
    peak = gemm_peak(args.device, dtype, seconds=1.0, ready=product_with)
    set_seed(0)
    targets = None if args.all_linear else ["q_proj", "k_proj", "v_proj"]
    peft = model if args.full else add_lora(model, rank=args.rank, alpha=args.rank, target_modules=targets)
    remove_randomness(peft)
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        start = time.perf_counter()
        run = _run_preftree if args.child == "preftree" else _run_trl
        losses = run(args, folder, peft, tokenizer, pairs)
        seconds = time.perf_counter() - start
    useful = ModelFlops.of(model, peak).useful(_counts(args, pairs))
    return {
        "pairs_per_second": len(pairs) * args.epochs / seconds,
        "seconds": seconds,
        "peak_gib": memory.peak / 2**30,
        "losses": losses,
        "gemm_peak_gflops": peak / 1e9,
        "mfu": useful / seconds / peak,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _run_preftree(args: argparse.Namespace, folder: str, peft: Any, tokenizer: Any, pairs: list[Any]) -> list[float]:
    from rich.console import Console

    from preftree.hardware.memory import keep_freed_memory
    from preftree.train.config import DPOConfig
    from preftree.train.trainer import DPOTrainer

    keep_freed_memory()  # as `preftree train` does
    config = DPOConfig(**_training(args, folder), per_device_train_batch_size=args.step, reference_cache=False)
    console = Console(quiet=True)
    trainer = DPOTrainer(peft, args=config, train_dataset=pairs, processing_class=tokenizer, console=console)
    trainer.train()
    return _losses(trainer)


def _run_trl(args: argparse.Namespace, folder: str, peft: Any, tokenizer: Any, pairs: list[Any]) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """Takes token ids as they are: both sides train on the same ones, and tokenizing is not timed."""

        def _prepare_dataset(self, dataset: Any, *others: Any, **more: Any) -> Any:
            return dataset

    config = DPOConfig(
        **_training(args, folder),
        per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=args.step // args.trl_batch,
        gradient_checkpointing=False,
        max_length=None,
        precompute_ref_log_probs=args.epochs > 1 or args.trl_precompute,
        bf16=next(iter(peft.parameters())).dtype is not None and "bfloat16" in str(peft.dtype),
    )
    rows = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
        for p in pairs
    ]
    # TRL would load its reference by the model's name, which the bundled model has none of on a hub.
    second = copy.deepcopy(peft) if args.full and not config.precompute_ref_log_probs else None
    data = Dataset.from_list(rows)
    trainer = Tokenized(model=peft, ref_model=second, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return _losses(trainer)


def _training(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "seed": 0,
    }


def _losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def _counts(args: argparse.Namespace, pairs: list[Any]) -> Any:
    """The counts of a run without any sharing between pairs: each pair's tree, the reference once."""
    from preftree.train.metrics import SpeedMeter

    tree = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    scored = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    return SpeedMeter(
        tree_tokens=args.epochs * tree,
        scored_tokens=args.epochs * scored,
        reference_tokens=tree,
        reference_scored=scored,
    )


def _report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from preftree.hardware.environment import environment

    def median(side: str, key: str) -> float:
        return statistics.median(r[key] for r in results[side])

    ratios = [a["pairs_per_second"] / b["pairs_per_second"] for a, b in zip(*results.values(), strict=True)]
    memory = [b["peak_gib"] / a["peak_gib"] for a, b in zip(*results.values(), strict=True)]
    apart = max(
        abs(x - y)
        for a, b in zip(*results.values(), strict=True)
        for x, y in zip(a["losses"], b["losses"], strict=True)
    )
    env = environment()
    lines = [
        "",
        f"{args.model}, {args.pairs} pairs x {args.epochs} epochs, {args.step} per step, "
        f"{results['preftree'][0]['dtype']}, {env['cpu']}, {env['threads']['torch']} threads, "
        f"GEMM peak {median('preftree', 'gemm_peak_gflops'):.0f} GFLOP/s",
        f"{'':12}{'pairs/s':>10}{'peak GiB':>10}{'mfu':>13}",
    ]
    for side in SIDES:
        numbers = (median(side, "pairs_per_second"), median(side, "peak_gib"), median(side, "mfu"))
        lines.append(f"{side:12}{numbers[0]:10.4f}{numbers[1]:10.2f}{100 * numbers[2]:12.0f}%")
    lines.append(f"speed ratio  min {min(ratios):.2f}  median {statistics.median(ratios):.2f}  max {max(ratios):.2f}")
    lines.append(f"memory ratio {statistics.median(memory):.2f}; largest difference of a step's loss {apart:.1e}")
    asked = {name: value for name, value in vars(args).items() if name not in ("json", "child")}
    return {"table": "\n".join(lines), "environment": env, "arguments": asked, "ratios": ratios, "runs": results}


if __name__ == "__main__":
    sys.exit(main())
