"""Make the demo's preference set: `python -m preftree.demo.build --out DIR`.

The prompts and chosen answers come from `preftree.demo.kinds`, written by construction. The rejected
answer of each is what the model itself said when asked and what its check says is wrong; a prompt that
the model never gets wrong is dropped. How that answer is drawn decides whether a short training run learns
what was asked or something cheaper. What two earlier versions of this set taught, when the model was trained on
them with DPO (untrained, 13 of 102 greedy held-out answers pass):

- Samples at temperature 1, all longer than the chosen answers: every answer became one word, 8 of 102 passed.
  So: temperature 0.7 among the 20 likeliest tokens, since at 1 this small model talks nonsense that greedy
  decoding would never say; and every second prompt is put after two questions that were answered in one word.
  That helps a little only: 5 of 6 rejected answers are still longer than the chosen one.
- Samples cut in mid-sentence to the length of the chosen answer: training mostly learned not to end, since the
  end token behind a cut is what the model finds least likely. So: answers end where the model ended them, or at
  the end of a sentence.

Equal seeds give equal files, byte for byte, with the same torch, transformers and kind of processor:
every batch has fixed members and a seed of its own, and arithmetic runs in float32 on one thread.
Another processor or BLAS adds numbers in another order and may sample other rejected answers; the
prompts, chosen answers and checks stay the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from preftree.demo.answers import Answer, Sampling, answer_batch, by_length, render_prompts
from preftree.demo.checks import passes
from preftree.demo.kinds import SPLITS, Example, Split, make_examples
from preftree.errors import PreftreeError, RunError
from preftree.model.load import load_model, load_tokenizer, resolve

DATA_FOLDER = Path(__file__).parent / "data"
"""Where the shipped train.jsonl and heldout.jsonl are."""

# The end of a sentence. The dot of "2." starts a list item, it ends nothing.
_SENTENCE_END = re.compile(r"(?<!\d)[.!?](?=\s|$)")
_MIN_WORDS = 3
# What goes before the question to get a terse answer.
_TERSE: tuple[tuple[str, str], ...] = (
    ("The capital of Italy, nothing else:", "Rome"),
    ("Write only the plural of mouse.", "mice"),
)


@dataclass(frozen=True)
class Recipe:
    """How the set is made; the defaults made the shipped files."""

    per_kind: dict[Split, int] = field(default_factory=lambda: {"train": 28, "heldout": 6})
    """Prompts of each kind."""
    max_new_tokens: int = 32
    """Longest sampled answer; one that is cut there is trimmed to its last full sentence."""
    rounds: int = 4
    """How often a prompt is asked before it is dropped."""
    batch_size: int = 32
    """Prompts sampled together. Part of the recipe: other batches draw other answers."""


def build(
    model: Any,
    tokenizer: Any,
    seed: int = 0,
    recipe: Recipe | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[Split, list[dict[str, str]]]:
    """The rows of both splits, each with system, question, chosen, rejected, kind and check (JSON text)."""
    recipe = recipe or Recipe()
    rows: dict[Split, list[dict[str, str]]] = {}
    for number, split in enumerate(SPLITS):
        examples = make_examples(split, recipe.per_kind[split], seed)
        say(f"{split}: {len(examples)} prompts")
        first_seed = 1_000_000 * seed + 100_000 * number
        rejected = sample_rejected(model, tokenizer, examples, first_seed, recipe, say)
        rows[split] = [
            _row(example, text) for example, text in zip(examples, rejected, strict=True) if text is not None
        ]
        say(f"{split}: {len(rows[split])} pairs, {len(examples) - len(rows[split])} prompts dropped")
    return rows


def sample_rejected(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    first_seed: int,
    recipe: Recipe,
    say: Callable[[str], None] = lambda line: None,
) -> list[str | None]:
    """One sampled answer that fails its check for each example; None where there was none in all rounds.

    Every second example is asked for a terse answer; in the second half of the rounds it is the other way
    round for those still without an answer.
    """
    questions, systems = [e.question for e in examples], [e.system for e in examples]
    plain = render_prompts(tokenizer, questions, systems)
    terse = render_prompts(tokenizer, questions, systems, _TERSE)
    found: dict[int, str] = {}
    for attempt in range(recipe.rounds):
        swapped = attempt >= recipe.rounds // 2
        prompts = [(terse if (row % 2 == 1) != swapped else plain)[row] for row in range(len(examples))]
        pending = [row for row in by_length(prompts) if row not in found]
        started = time.monotonic()
        for start in range(0, len(pending), recipe.batch_size):
            rows = pending[start : start + recipe.batch_size]
            sampling = Sampling(first_seed + 1000 * attempt + start // recipe.batch_size)
            answers = answer_batch(model, tokenizer, [prompts[row] for row in rows], recipe.max_new_tokens, sampling)
            for row, answer in zip(rows, answers, strict=True):
                text = trim(answer)
                if text and not passes(examples[row].check, text):
                    found[row] = text
            say(_progress(attempt, start + len(rows), len(pending), time.monotonic() - started))
    return [found.get(row) for row in range(len(examples))]


def trim(answer: Answer) -> str:
    """The answer as it ended, or up to its last full sentence if it was cut; "" if there is none."""
    if answer.finished:
        return answer.text
    ends = [match.end() for match in _SENTENCE_END.finditer(answer.text)]
    text = answer.text[: ends[-1]] if ends else ""
    return text if len(text.split()) >= _MIN_WORDS else ""


def write_jsonl(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write the rows, one a line; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8", newline="\n") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def read_split(split: Split, folder: Path = DATA_FOLDER) -> list[dict[str, str]]:
    """The rows of a split as shipped (or as built into `folder`)."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for anything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m preftree.demo.build", description="Make the demo set.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--model", default="smollm2", help="smollm2 (the bundled model) or a model folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and samples")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    options = parser.parse_args(arguments)
    try:
        paths = _output_paths(options.out, options.overwrite)
        # How a sum is cut into parts, hence its last bit, depends on the number of threads.
        torch.set_num_threads(1)
        source = resolve(options.model)
        tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
        rows = build(model, tokenizer, options.seed, say=lambda line: print(line, file=sys.stderr, flush=True))
    except PreftreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        write_jsonl(rows[split], path)
        print(f"{path}: {len(rows[split])} pairs, {path.stat().st_size:,} bytes")
    return 0


def _output_paths(folder: Path, overwrite: bool) -> dict[Split, Path]:
    paths: dict[Split, Path] = {split: folder / f"{split}.jsonl" for split in SPLITS}
    there = [str(path) for path in paths.values() if path.exists()]
    if there and not overwrite:
        raise RunError(
            f"{' and '.join(there)} already there: nothing was written. "
            f"Choose another --out, or add --overwrite to replace them."
        )
    return paths


def _row(example: Example, rejected: str) -> dict[str, str]:
    # The check is kept as text: readers of tables want one type a column, and its fields differ by kind.
    return {
        "system": example.system,
        "question": example.question,
        "chosen": example.chosen,
        "rejected": rejected,
        "kind": example.kind,
        "check": json.dumps(example.check, ensure_ascii=False),
    }


def _progress(attempt: int, done: int, total: int, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    left = (total - done) / max(rate, 1e-9)
    return f"round {attempt + 1}, {done}/{total} answers, {rate:.1f}/s, {left:.0f} s left in this round"


if __name__ == "__main__":
    sys.exit(main())
