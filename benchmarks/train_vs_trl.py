"""preftree beside TRL's DPOTrainer: same weights, token ids, order, LoRA start and pairs per optimizer step.

    python benchmarks/train_vs_trl.py [--pairs 36] [--rounds 3] [--trl_batch 1 2 4]

Each side runs in a fresh process, in turn, forwards and backwards, so that a machine that drifts drifts for all. TRL
runs with its fused head and without checkpointing, in every `--trl_batch` (pairs per forward pass), and the ratio is
stated against the fastest of them. Compared is the steady state: the first step, which pays for fresh memory and for
checks, is timed apart (`train_sides.py` says what is counted). Printed: pairs/s of all, the ratio round by round (min,
median, max), peak memory of the whole run, the share of the machine's GEMM peak that useful arithmetic takes, and how
far the losses are apart. `--json FILE` keeps all of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from side_by_side import ROOT, answer, fresh_process, kept_arguments

DATA = ROOT / "benchmarks" / "data" / "orca_pairs.jsonl"
OURS = "preftree"
#: Columns of a side's name in tables.
WIDTH = 29


def main() -> int:
    if _wants_shapes(sys.argv[1:]):
        import cuda_shapes

        return cuda_shapes.main(sys.argv[1:])
    args = _arguments()
    if args.child:
        from train_sides import run_side

        answer(run_side(args))
        return 0
    sides = {OURS: ["--child", OURS]} | {
        f"TRL, {mode}pairs of {batch}": ["--child", "trl", "--batch", str(batch), *flags]
        for mode, flags in _modes(args).items()
        for batch in args.trl_batch
    }
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side, flags in list(sides.items())[:: 1 if number % 2 == 0 else -1]:
            found = fresh_process([__file__, *sys.argv[1:], *flags], side)
            results[side].append(found)
            print(
                f"round {number + 1}/{args.rounds} {side:{WIDTH}} {found['pairs_per_second']:.4f} pairs/s  "
                f"{found['peak_gib']:.2f} GiB  loss {found['losses'][0]:.4f} … {found['losses'][-1]:.4f}",
                flush=True,
            )
    report = _report(args, results)
    print(report["table"])
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _modes(args: argparse.Namespace) -> dict[str, list[str]]:
    """How TRL has its reference, in words, and the flags of a child that does."""
    return {"second model, ": [], "precomputed, ": ["--trl_precompute"]} if args.trl_both else {"": []}


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
    add("--pairs", type=int, default=36, help="pairs of the run, taken evenly from the file (%(default)s)")
    add("--step", type=int, default=4, help="pairs of one optimizer step (%(default)s)")
    add("--trl_batch", type=int, nargs="+", default=[1, 2, 4], help="pairs TRL computes at once (1 2 4)")
    add("--epochs", type=int, default=1)
    add("--rounds", type=int, default=3)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--device", default="cpu")
    add("--full", action="store_true", help="full fine-tuning in place of LoRA")
    add("--trl_precompute", action="store_true", help="full fine-tuning: TRL computes its reference before training")
    add(
        "--trl_both",
        action="store_true",
        help="full fine-tuning: TRL in both ways, with a second model and precomputed",
    )
    add("--all_linear", action="store_true", help="LoRA on every linear layer, not only q, k and v")
    add("--rank", type=int, default=16)
    add("--max_length", type=int, default=1024)
    add("--max_prompt_length", type=int, default=512)
    add("--learning_rate", type=float, default=5e-4)
    add("--json", help="file for all numbers")
    add("--child", choices=(OURS, "trl"), help=argparse.SUPPRESS)
    add("--batch", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if wrong := [batch for batch in args.trl_batch if args.step % batch]:
        parser.error(f"--trl_batch {wrong[0]} does not divide the {args.step} pairs of a step (--step)")
    if args.trl_both and not args.full:
        parser.error("--trl_both is about full fine-tuning: add --full")
    if args.pairs * args.epochs <= args.step:
        parser.error(f"--pairs {args.pairs} is one step of {args.step}; the first step is not counted, so give more")
    return args


def _report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from preftree.hardware.environment import environment

    def median(side: str, key: str) -> float:
        return statistics.median(float(run[key]) for run in results[side])

    ours = results[OURS]
    others = {side: runs for side, runs in results.items() if side != OURS}
    best = max(others, key=lambda side: median(side, "pairs_per_second"))
    ratios = [a["pairs_per_second"] / b["pairs_per_second"] for a, b in zip(ours, others[best], strict=True)]
    apart = max(
        abs(x - y)
        for runs in others.values()
        for a, b in zip(ours, runs, strict=True)
        for x, y in zip(a["losses"], b["losses"], strict=True)
    )
    env = environment()
    lines = [
        "",
        f"{args.model}, {args.pairs} pairs x {args.epochs} epochs, {args.step} per step, {ours[0]['dtype']}, "
        f"{env['cpu']}, {env['threads']['torch']} threads, GEMM peak {median(OURS, 'gemm_peak_gflops'):.0f} GFLOP/s",
        f"{'':{WIDTH}}{'pairs/s':>10}{'whole run':>11}{'first step s':>14}{'peak GiB':>10}{'mfu':>7}",
    ]
    for side, runs in results.items():
        first = statistics.median(run["seconds"]["first"] for run in runs)
        lines.append(
            f"{side:{WIDTH}}{median(side, 'pairs_per_second'):10.4f}{median(side, 'whole_pairs_per_second'):11.4f}"
            f"{first:14.2f}{median(side, 'peak_gib'):10.2f}{100 * median(side, 'mfu'):6.0f}%"
        )
    lines.append(
        f"speed against {best}, TRL's best: min {min(ratios):.2f}  median {statistics.median(ratios):.2f}  "
        f"max {max(ratios):.2f}; the whole run "
        f"{median(OURS, 'whole_pairs_per_second') / median(best, 'whole_pairs_per_second'):.2f}"
    )
    shares = (f"{100 * median(OURS, 'peak_gib') / median(side, 'peak_gib'):.0f} % of {side}" for side in others)
    lines.append(f"memory: {', '.join(shares)}; largest difference of a step's loss {apart:.1e}")
    return {
        "table": "\n".join(lines),
        "environment": env,
        "arguments": kept_arguments(args, but=("json", "child", "batch")),
        "best": best,
        "ratios": ratios,
        "runs": results,
    }


if __name__ == "__main__":
    sys.exit(main())
