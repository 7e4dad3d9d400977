"""Which model families work, how, and how exactly: writes docs/models.md.

    python scripts/model_coverage.py                      every causal-LM family of the installed transformers
    python scripts/model_coverage.py llama mixtral ...    these families, printed (and kept, with --rows FILE)

For each family a tiny random model (tests/support/families.py: 4 layers, lively weights, windows of 32 tokens, its
dropout switched on) gets an adapter with B ≠ 0. A forest whose paths are about 180 tokens deep is scored by the path
that `attach` chooses, and log-probs and LoRA gradients are compared with those of the same sequences one at a time in
float64, through the model's own code and eager attention. Weights are exact in bfloat16, so that they are the same in
all precisions. The model's own rounding is measured the same way: its own code, one sequence at a time, in float32 and
in bfloat16, the largest error of eager attention, sdpa and, in bfloat16, a few draws in which products and norms are
rounded otherwise at random (a choice of experts that turns moves a log-prob by tenths or not at all). Then the model is
trained for two steps by the real command with default flags: its first loss has to be ln 2. Every family runs in a
process of its own with a time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

from preftree.config.train import parse_settings  # noqa: E402
from preftree.errors import ModelError, PreftreeError  # noqa: E402
from preftree.forest import Bundle, Forest  # noqa: E402
from preftree.model import selfcheck, structure  # noqa: E402
from preftree.model.cpu.kernels import usable  # noqa: E402
from preftree.model.determinism import check_causal, remove_randomness  # noqa: E402
from preftree.model.load import ModelSource, load_model, resolve  # noqa: E402
from preftree.model.lora import add_lora  # noqa: E402
from preftree.model.score import attach  # noqa: E402
from preftree.train.run import train as run  # noqa: E402
from scripts.coverage_table import Row, document, table  # noqa: E402
from tests.support import families  # noqa: E402
from tests.support.command import TEMPLATE, write_inputs  # noqa: E402
from tests.support.tiny import attention_of, gradients, plain_logprobs, word_tokenizer  # noqa: E402

#: Seconds for one family.
LIMIT = 240
#: Families of different construction, for the test suite.
SHORT = (
    "llama", "mistral", "gemma2", "gemma3_text", "qwen2_moe", "gpt_oss", "phi3, longrope", "llama4_text", "deepseek_v3",
    "mixtral", "phimoe", "seed_oss", "starcoder2", "falcon", "gpt_bigcode", "bloom", "gpt2", "mamba", "jamba",
    "granitemoehybrid", "opt", "mpt",
)  # fmt: skip


def deep_forest(seed: int = 0) -> Forest:
    """A prompt of 100 tokens that forks into one of 160 with two answers and one of 140, and a short one beside it."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, families.VOCABULARY) for _ in range(count))

    shared = ids(100)
    return Forest.of(
        [
            Bundle(shared + ids(60), (ids(20), ids(7)), (0, 1)),
            Bundle(shared + ids(40), (ids(15),), (2,)),
            Bundle(ids(12), (ids(5), ids(9)), (3, 4)),
        ]
    )


def save(family: str, folder: Path) -> ModelSource:
    """A folder with a tiny model of the family."""
    try:
        model = families.tiny_model(family)
    except Exception as problem:  # of transformers: a config that small sizes do not fit, a missing vision library
        raise ModelError(f"no tiny model: {type(problem).__name__}: {problem}".strip().splitlines()[0]) from problem
    model.save_pretrained(folder)
    return resolve(str(folder))


def adapted(source: ModelSource, dtype: torch.dtype) -> PeftModel:
    """The model as training has it, with LoRA wherever it can go, exact in bfloat16."""
    base = load_model(source, dtype)
    check_causal(base)
    model = add_lora(base, rank=4, alpha=8)
    remove_randomness(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_((0.1 * torch.randn(weight.shape, generator=generator)).bfloat16())
    return model.eval()


def measure(row: Row, folder: Path) -> None:
    """Fill in path and errors in float32 and bfloat16."""
    source, forest = save(row.family, folder / "model"), deep_forest()
    model = adapted(source, torch.float32)
    exact = truth(model, forest)
    row.logprob_noise, row.gradient_noise = own_rounding(partial(copy.deepcopy, model), forest, exact)
    found, row.path, row.reason = scored(model, forest)
    row.logprob_error, row.gradient_error = errors(found, exact)
    make_half = partial(adapted, source, torch.bfloat16)
    row.half_noise, row.half_gradient_noise = own_rounding(make_half, forest, exact)
    found, row.half_path, reason = scored(adapted(source, torch.bfloat16), forest)
    row.half_error, row.half_gradient_error = errors(found, exact)
    if row.half_path != row.path:
        row.reason += f"; bfloat16: {reason}"


Scores = tuple[Tensor, dict[str, Tensor]]


class _WideProducts(TorchFunctionMode):
    """Products with weights in float64, whatever their input is cast to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            args = [each.double() if isinstance(each, Tensor) else each for each in args]
        return func(*args, **(kwargs or {}))


def truth(model: PeftModel, forest: Forest) -> Scores:
    """Log-probs and gradients in float64."""
    try:
        return oracle(copy.deepcopy(model).double(), forest, "eager")
    except RuntimeError:  # XGLM makes constants of the default dtype, Inkling 2 casts to float32 before a product
        torch.set_default_dtype(torch.float64)
        try:
            with _WideProducts():
                return oracle(copy.deepcopy(model).double(), forest, "eager")
        finally:
            torch.set_default_dtype(torch.float32)


def oracle(model: PeftModel, forest: Forest, attention: str) -> Scores:
    """Log-probs and gradients from the model's own logits, one sequence at a time."""
    base = model.get_base_model()
    limits = structure.Limits.of(base)
    with contextlib.ExitStack() as stack:
        # Dynamic NTK remembers the longest sequence so far; each is scored as by a model that saw no other.
        stack.callback(base.register_forward_pre_hook(lambda *_: limits.reset()).remove)
        with contextlib.suppress(ValueError, ImportError):  # it has one attention only
            stack.enter_context(attention_of(base, attention))
        if base.dtype == torch.float64:
            base.set_experts_implementation("eager")  # the fast ones have no float64
        token_S = plain_logprobs(base, forest)
        return token_S.detach().double(), gradients(model, token_S)


def own_rounding(make: Callable[[], PeftModel], forest: Forest, exact: Scores) -> tuple[float, float]:
    """The largest errors of log-probs and gradients that the model's own code makes in the precision of `make`."""
    found = [errors(oracle(make(), forest, kind), exact) for kind in ("eager", "sdpa")]
    base = (model := make()).get_base_model()
    # Float32 is hardly ever wide enough to turn a choice or to leave the first order.
    for draw in range(selfcheck.draws_of(base) if base.dtype == torch.bfloat16 else 0):
        with selfcheck.rounded_otherwise(base, seed=draw):
            found.append(errors(oracle(model, forest, "eager"), exact))
    return max(logprobs for logprobs, _ in found), max(gradients for _, gradients in found)


def scored(model: PeftModel, forest: Forest) -> tuple[Scores, str, str]:
    """The same through the path that is chosen, with its name and the reason."""
    with attach(model) as scorer:
        token_S = scorer(forest).token_S
        return (token_S.detach().double(), gradients(model, token_S)), scorer.name, scorer.reason


def errors(found: Scores, expected: Scores) -> tuple[float, float]:
    """Largest error of a log-prob, and of a gradient in units of the largest entry of its tensor.

    A tensor whose gradients are a thousand times smaller than another's is compared with that one's thousandth.
    """
    (logprobs, gradient), (exact_logprobs, exact_gradient) = found, expected
    largest = max(float(want.abs().max()) for want in exact_gradient.values())
    worst = 0.0
    for name, want in exact_gradient.items():
        error = float((gradient[name].double() - want.double()).abs().max())
        worst = max(worst, error / max(float(want.abs().max()), 1e-3 * largest))
    return float((logprobs - exact_logprobs).abs().max()), worst


def train(row: Row, folder: Path) -> None:
    """Two steps of the real command with default flags on a saved model."""
    write_inputs(folder)
    shutil.rmtree(folder / "model")
    save(row.family, folder / "model")
    # Not beside the model, whose type would decide the tokenizer's class.
    word_tokenizer(TEMPLATE).save_pretrained(folder / "tokenizer")
    flags = {
        "model_name_or_path": folder / "model",
        "tokenizer_name": folder / "tokenizer",
        "dataset_name": folder / "pairs.jsonl",
        "output_dir": folder / "out",
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "torch_dtype": "float32",
    }
    if getattr(AutoConfig.from_pretrained(folder / "model"), "router_aux_loss_coef", None):
        flags["router_aux_loss_coef"] = 0  # else it is part of the loss, which then starts above ln 2
    run(parse_settings([piece for flag, value in flags.items() for piece in (f"--{flag}", str(value))]))
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in log if "loss" in entry)
    row.first_loss = first["loss"]
    row.trains = (folder / "out" / "adapter_model.safetensors").is_file()


#: Something to find out about a family, with a folder of its own.
Step = Callable[[Row, Path], None]


def examine(family: str, steps: Sequence[Step] = (measure, train)) -> Row:
    """All of it; whatever goes wrong is in the row."""
    row = Row(family)
    for step in steps:
        with tempfile.TemporaryDirectory() as folder:
            try:
                step(row, Path(folder))
            except PreftreeError as refusal:
                row.reason = str(refusal).splitlines()[0]
            except Exception as problem:
                row.reason = f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
                row.traceback = traceback.format_exc()
    return row


def _work(family: str, steps: Sequence[Step], queue: Any) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        row = examine(family, steps)
    queue.put(dataclasses.asdict(row))


def examine_apart(family: str, steps: Sequence[Step]) -> Row:
    """`examine` in a process of its own, which may take `LIMIT` seconds or crash."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_work, args=(family, steps, queue), daemon=True)
    process.start()
    try:
        return Row(**queue.get(timeout=LIMIT))
    except Exception:  # queue.Empty
        words = f"no result after {LIMIT} s" if process.is_alive() else f"the process died ({process.exitcode})"
        return Row(family, reason=words, traceback=words)
    finally:
        process.kill()
        process.join()


def _kept_rows(path: Path | None) -> dict[str, Row]:
    """What earlier runs found, the latest of each family."""
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.family: row for row in rows}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", help="families to examine; all of them, into --out, by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("--rows", type=Path, help="keep what was found here; a run of all goes on with it")
    parser.add_argument("--no_training", action="store_true", help="measure log-probs and gradients only")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked from this one
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    steps = [measure] if args.no_training else [measure, train]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PREFTREE_CACHE"] = cache
        # Compiled, imported and built once here, not in every process: kernels, libraries, transformers' tables.
        usable()
        examine("llama", [measure])
        asked = args.families or families.all_families()
        kept = {} if args.families else _kept_rows(args.rows)
        for family in asked:
            if (row := kept.get(family)) is None:
                row = dataclasses.replace(examine_apart(family, steps), commit=commit)
                if args.rows:
                    with open(args.rows, "a", encoding="utf-8") as file:
                        file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            if row.traceback:
                print("    " + "\n    ".join(row.traceback.strip().splitlines()[-4:]), flush=True)
            if not args.families:  # after each, so that an interrupted run leaves what it has
                args.out.write_text(document(rows, len(asked)), encoding="utf-8")
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
