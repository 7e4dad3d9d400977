"""preftree's evaluation beside lm-eval's own `hf` model: same weights, tasks, questions, contexts and token ids.

    python benchmarks/eval_vs_lm_eval.py --limit 4 [--data DIR]

The two alternate in fresh processes, one after the other, so that a machine that drifts drifts for both. lm-eval runs
with each of `--hf_batch_sizes` and its cache of one-token answers on; its fastest batch size counts, task by task.
Timed is everything between a task's requests and its answers, tokenizing included, the model's loading not. Printed:
seconds and ratios by task (median of the rounds) and together, peak memory, and how far the answers are apart.
`--json FILE` keeps all of it. With `--rounds 0` nothing is timed against each other: each side runs once, one after
the other, and only their answers are compared; finished answers are kept in `--answers DIR`, so that can be stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import ROOT, PeakMemory, answer, fresh_process, kept_arguments

# Small samples; `preftree evaluate --export-data DIR` writes the whole test sets.
DATA = ROOT / "tests" / "samples" / "eval"


def main() -> int:
    args = _arguments()
    if args.child:
        answer(_child(args))
        return 0
    sides = ["preftree", *(f"hf:{size}" for size in args.hf_batch_sizes.split(","))]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(max(1, args.rounds)):
        for side in sides if number % 2 == 0 else sides[::-1]:
            found = fresh_process([__file__, *sys.argv[1:], "--child", side], side, show_errors=True)
            runs[side].append(found)
            seconds = "  ".join(f"{task} {t['seconds']:.1f} s" for task, t in found["tasks"].items())
            print(f"round {number + 1} {side:9} {found['peak_gib']:.2f} GiB  {seconds}", flush=True)
    report = _report(args, runs)
    print(report["table"])
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--adapter")
    add("--data", default=str(DATA), help="folder of local files, or hub (%(default)s)")
    add("--tasks", default="openllm")
    add("--limit", type=int, default=4, help="questions per task, of MMLU per subject (%(default)s)")
    add("--rounds", type=int, default=3)
    add("--dtype", default="float32")
    add("--device", default="cpu")
    add("--hf_batch_sizes", default="1", help="lm-eval's batch sizes to try, separated by commas (%(default)s)")
    add("--tokens_per_forest", type=int)
    add("--answers", help="folder in which answers are kept as they come; only for --rounds 0")
    add("--profile", action="store_true", help="print where preftree's time goes, and nothing else")
    add("--json", help="file for all numbers")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answers and args.rounds:
        parser.error("--answers would make the second round free; it needs --rounds 0")
    if args.profile:
        args.child = "preftree"
    return args


def _child(args: argparse.Namespace) -> dict[str, Any]:
    import logging
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import datasets
    import torch
    from lm_eval.models.huggingface import HFLM

    from preftree.evaluate.cache import RequestCache
    from preftree.evaluate.harness import PreftreeLM
    from preftree.evaluate.tasks import expand, plan_tasks
    from preftree.model.load import load_model, load_tokenizer, resolve
    from preftree.model.lora import load_adapter

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    side, _, batch_size = args.child.partition(":")
    lm: Any
    if side == "hf":
        # Loaded here and not by lm-eval, which cannot read the bundled model's GGUF file with its tokenizer.
        source = resolve(args.model)
        model: Any = load_model(source, getattr(torch, args.dtype)).to(args.device)
        model = load_adapter(model, args.adapter) if args.adapter else model
        lm = HFLM(pretrained=model, tokenizer=load_tokenizer(source), batch_size=batch_size)
    else:
        common = {"peft": args.adapter, "dtype": args.dtype, "device": args.device}
        lm = PreftreeLM(args.model, tokens_per_forest=args.tokens_per_forest, **common)
    if args.answers:
        cache = RequestCache(Path(args.answers) / f"{side}-{args.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        manager = plan_tasks(expand(args.tasks), Path(folder), args.data)
        loaded = manager.load(expand(args.tasks))
    requests = _requests(loaded["tasks"], args.limit)
    if args.profile:
        _profile(lm, requests)
    tasks = {}
    with PeakMemory() as memory:
        for name, asked in requests.items():
            start = time.perf_counter()
            answers = _remembering(lm, cache, asked) if args.answers else lm.loglikelihood(asked, disable_tqdm=True)
            tasks[name] = {"seconds": time.perf_counter() - start, "answers": [list(map(float, a)) for a in answers]}
    for name, asked in requests.items():
        tasks[name] |= {"questions": len({(r.task_name, r.doc_id) for r in asked}), "requests": len(asked)}
        tasks[name]["metrics"] = _metrics(loaded["tasks"], asked, tasks[name]["answers"])
    return {"tasks": tasks, "peak_gib": memory.peak / 2**30, "threads": torch.get_num_threads()}


def _requests(tasks: dict[str, Any], limit: int) -> dict[str, list[Any]]:
    """lm-eval's requests of each task; those of MMLU's subjects together."""
    requests: dict[str, list[Any]] = {}
    for name, task in tasks.items():
        task.set_fewshot_seed(1234)  # what simple_evaluate sets
        task.build_all_requests(limit=limit)
        requests.setdefault("mmlu" if name.startswith("mmlu_") else name, []).extend(task.instances)
    return requests


def _metrics(tasks: dict[str, Any], asked: list[Any], answers: list[list[float]]) -> dict[str, float]:
    """lm-eval's own metrics of these answers, averaged over the questions."""
    questions: dict[tuple[str, int], list[Any]] = {}
    for request, (logprob, greedy) in zip(asked, answers, strict=True):
        questions.setdefault((request.task_name, request.doc_id), []).append((request, (logprob, bool(greedy))))
    found: dict[str, list[float]] = {}
    for (task, _), parts in questions.items():
        scores = tasks[task].process_results(parts[0][0].doc, [answer for _, answer in parts])
        for metric, value in scores.items():
            found.setdefault(metric, []).append(float(value))
    return {metric: statistics.fmean(values) for metric, values in found.items()}


def _remembering(lm: Any, cache: Any, asked: list[Any]) -> list[Any]:
    """Answers through a cache on disk, so that a comparison of many questions can be stopped and continued."""
    from preftree.evaluate.cache import request_key

    lm.set_cache_hook(cache)
    keys = [request_key("loglikelihood", request.args) for request in asked]
    missing = [request for key, request in zip(keys, asked, strict=True) if cache.get(key) is None]
    if missing:
        lm.loglikelihood(missing)
    return [cache.get(key) for key in keys]


def _profile(lm: Any, requests: dict[str, list[Any]]) -> None:
    from torch.profiler import ProfilerActivity, profile

    for name, asked in requests.items():
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            lm.loglikelihood(asked, disable_tqdm=True)
        print(f"{name}: {time.perf_counter() - start:.2f} s")
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))
    sys.exit(0)


def _report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from preftree.hardware.environment import environment

    env, ours = environment(), runs["preftree"]
    others = [side for side in runs if side != "preftree"]
    names = list(ours[0]["tasks"])

    def seconds(side: str, name: str) -> float:
        return statistics.median(run["tasks"][name]["seconds"] for run in runs[side])

    best = {name: min(others, key=lambda side: seconds(side, name)) for name in names}
    lines = [
        "",
        f"{args.model}, {args.dtype}, {env['cpu']}, {ours[0]['threads']} threads, rounds: {args.rounds}",
        f"{'task':18}{'questions':>10}{'requests':>10}{'preftree':>11}{'lm-eval':>11}{'its batch':>10}{'ratio':>7}"
        f"{'apart':>10}{'greedy':>8}{'metrics':>9}",
    ]
    ratios: dict[str, list[float]] = {}
    for name in names:
        pairs = list(zip(ours, runs[best[name]], strict=True))
        ratios[name] = [b["tasks"][name]["seconds"] / a["tasks"][name]["seconds"] for a, b in pairs]
        first, other = ours[0]["tasks"][name], runs[best[name]][0]["tasks"][name]
        apart = max(abs(a[0] - b[0]) for a, b in zip(first["answers"], other["answers"], strict=True))
        same = all(a[1] == b[1] for a, b in zip(first["answers"], other["answers"], strict=True))
        metrics = all(abs(first["metrics"][m] - other["metrics"][m]) < 1e-4 for m in first["metrics"])
        lines.append(
            f"{name:18}{first['questions']:10}{first['requests']:10}{seconds('preftree', name):9.2f} s"
            f"{seconds(best[name], name):9.2f} s{best[name].partition(':')[2]:>10}"
            f"{statistics.median(ratios[name]):7.2f}{apart:10.1e}{'equal' if same else 'OTHER':>8}"
            f"{'equal' if metrics else 'OTHER':>9}"
        )
    together = [
        sum(b["tasks"][n]["seconds"] for n, b in ((n, runs[best[n]][i]) for n in names))
        / sum(ours[i]["tasks"][n]["seconds"] for n in names)
        for i in range(len(ours))
    ]
    memory = {side: statistics.median(run["peak_gib"] for run in runs[side]) for side in runs}
    lines.append(
        f"together: {min(together):.2f} / {statistics.median(together):.2f} / {max(together):.2f} times as fast "
        f"(min / median / max); peak GiB: {', '.join(f'{side} {peak:.2f}' for side, peak in memory.items())}"
    )
    for found in (run for side in runs.values() for run in side[1:]):
        for task in found["tasks"].values():
            task.pop("answers")  # the first round's are enough
    arguments = kept_arguments(args, but=("json", "child", "answers", "profile"))
    return {"table": "\n".join(lines), "environment": env, "arguments": arguments, "ratios": ratios, "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
