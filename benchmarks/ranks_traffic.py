"""Bytes between ranks for one step: LoRA's gradients, all gradients, and a shared-out base; measured on loopback.

    torchrun --nproc_per_node 2 benchmarks/ranks_traffic.py [--layers 30]

The shape is SmolLM2-135M's, weights are random, ranks are processes of this machine over gloo and TCP. Bytes are what
the loopback interface counts, so nothing else may use it meanwhile. Results: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from preftree.distributed.ranks import Ranks
from preftree.forest import Bundle, Forest
from preftree.model.lora import add_lora
from preftree.model.score import attach, leaf_logprobs
from preftree.model.shard import shard_base

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (counts,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(counts[8])


def measure(ranks: Ranks, what: str, expected: float, work: Callable[[], object]) -> None:
    """Print the bytes sent per rank and the seconds of one call of `work` on all ranks; the first is not counted."""
    work()
    ranks.wait()
    before, start = loopback_bytes(), time.perf_counter()
    work()
    ranks.wait()
    seconds, sent = time.perf_counter() - start, (loopback_bytes() - before) / ranks.count
    if ranks.index == 0:
        ratio = f"{sent / expected:.2f} x" if expected else "-"
        print(f"{what:34} {sent / 1e6:9.3f} MB sent, {expected / 1e6:9.3f} expected ({ratio}), {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    layers = parser.parse_args().layers
    dist.init_process_group("gloo")
    ranks = Ranks(lockstep=True)
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)), rank=16)
    trained = [p for p in model.parameters() if p.requires_grad]
    lora, everything = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    if ranks.index == 0:
        print(
            f"{ranks.count} ranks, {everything / 1e6:.1f} M weights in float32, of which LoRA r=16 {lora / 1e6:.2f} M"
        )
    ring = 2 * (ranks.count - 1) / ranks.count  # an all-reduce; a gather is half of one
    measure(ranks, "counts of a step", 0, lambda: ranks.gather([0] * 8))
    measure(ranks, "LoRA's gradients", ring * 4 * lora, lambda: ranks.add_up([p.detach() for p in trained]))
    base = everything - lora
    gradient = torch.zeros(base)
    measure(ranks, "all gradients (full fine-tuning)", ring * 4 * base, lambda: dist.all_reduce(gradient))
    shard_base(model, "cpu")
    scorer = attach(model)
    forest = Forest.of([Bundle(tuple(range(5, 25)), ((3, 4), (6, 7)), (0, 1))])
    gathered = ring / 2 * 4 * (base - embedding)
    with torch.no_grad():
        measure(ranks, "shared-out base, a forward pass", gathered, lambda: leaf_logprobs(scorer, forest))
    measure(
        ranks,
        "and a forward and backward pass",
        2 * gathered,
        lambda: leaf_logprobs(scorer, forest).token_S.sum().backward(),
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
