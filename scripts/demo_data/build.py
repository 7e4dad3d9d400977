"""Make the demo's preference set: `python -m scripts.demo_data.build --out DIR`.

The prompts and chosen answers come from `scripts.demo_data.kinds`, written by construction. The rejected
answer of each is what the model itself said when asked and what its check says is wrong; a prompt that
the model never gets wrong is dropped. How that answer is drawn decides whether a short training run learns
what was asked or something cheaper. What earlier versions of this set taught, when the model was trained on
them with DPO (untrained, 13 of 102 greedy held-out answers pass):

- Samples at temperature 1, all longer than the chosen answers: every answer became one word, 8 of 102 passed.
  So: temperature 0.7 among the top 20 tokens, since at 1 this small model talks nonsense that greedy decoding would
  never say; and every second prompt is put after two questions that were answered in one word.
- Samples cut in mid-sentence to the length of the chosen answer: training mostly learned not to end, since the
  end token behind a cut is what the model finds least likely. So: answers end where the model ended them, or at
  the end of a sentence.
- Even so, 6 of 7 were longer than the chosen answer, and `preftree check` rightly warned of that. So: near misses
  (`near_miss.py`) take the place of some of them, until the longer answer is the chosen one as often as not.

The answers are drawn by the stage that `preftree prepare` draws its rejected ones with, so a build that was killed
goes on. Equal seeds give equal files, byte for byte, with the same torch, transformers and kind of processor, and
arithmetic runs in float32 on one thread. Another processor or BLAS adds numbers in another order and may sample
other rejected answers; the prompts, chosen answers and checks stay the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from preftree.data.chat import Chat, Messages
from preftree.data.record import Turn
from preftree.demo.checks import passes
from preftree.demo.rows import SPLITS, Split
from preftree.errors import PreftreeError, RunError
from preftree.io.atomic import atomic_file
from preftree.io.progress import Progress
from preftree.model.generate import Answer, Sampling
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.prepare.engines.local import RenderTokens, TransformersEngine
from preftree.prepare.generate import Judgement, Prompt, SamplingPlan, generate
from preftree.prepare.journal import Journal
from preftree.prepare.judge import trim
from preftree.prepare.workers import InProcess
from scripts.demo_data.kinds import Example, make_examples
from scripts.demo_data.near_miss import balanced

# What goes before the question to get a terse answer.
_TERSE: tuple[tuple[str, str], ...] = (
    ("The capital of Italy, nothing else:", "Rome"),
    ("Write only the plural of mouse.", "mice"),
)


@dataclass(frozen=True)
class Recipe:
    """How the set is made."""

    per_kind: dict[Split, int] = field(default_factory=lambda: {"train": 28, "heldout": 6})
    """Prompts of each kind."""
    max_new_tokens: int = 32
    """Longest sampled answer; one that is cut there is trimmed to its last full sentence."""
    rounds: int = 4
    """How often a prompt is asked before it is dropped."""
    batch_size: int = 32
    """Prompts sampled together."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_k=20))
    """How tokens are drawn."""


def build(
    model: Any,
    tokenizer: Any,
    folder: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    console: Console | None = None,
) -> dict[Split, list[dict[str, str]]]:
    """The rows of both splits, each with system, question, chosen, rejected, kind and check (JSON text).

    What was sampled is kept in `folder`, so that a build that was stopped goes on there.
    """
    recipe, console = recipe or Recipe(), Console(stderr=True, soft_wrap=True)
    chat = Chat(tokenizer)
    engine = TransformersEngine(model, chat, recipe.sampling, recipe.max_new_tokens)
    plan = SamplingPlan(seed, 1, recipe.batch_size, recipe.rounds)
    rows: dict[Split, list[dict[str, str]]] = {}
    for split in SPLITS:
        examples = make_examples(split, recipe.per_kind[split], seed)
        prompts = [_prompt(f"{split}/{row}", row, example, chat, recipe.rounds) for row, example in enumerate(examples)]
        progress = _progress(console, split)
        journal = Journal(folder / f"{split}.jsonl")
        found = generate(prompts, plan, RenderTokens(chat), InProcess(), lambda: engine, journal, progress)
        answered = [(example, kept[0].text) for example, kept in zip(examples, found.kept, strict=True) if kept]
        rejected = balanced([example for example, _ in answered], [text for _, text in answered])
        rows[split] = [_row(example, text) for (example, _), text in zip(answered, rejected, strict=True)]
        console.print(f"{split}: {len(rows[split])} pairs, {found.given_up.total()} prompts dropped")
    return rows


def _progress(console: Console, split: Split) -> Callable[[int, int], Progress]:
    return lambda attempt, _: Progress(console, f"{split}: round {attempt + 1}, ", "answers")


def _prompt(key: str, row: int, example: Example, chat: Chat, rounds: int) -> Prompt:
    """The example as it is asked, and its check as the judge of answers.

    Every second example is asked for a terse answer; in the second half of the rounds it is the other way round
    for those still without an answer.
    """
    turns = [Turn("user", example.question)]
    shown = [Turn(role, text) for pair in _TERSE for role, text in zip(("user", "assistant"), pair, strict=True)]
    system = example.system or None
    plain, terse = chat.messages(system, turns), chat.messages(system, shown + turns)

    def messages(number: int, attempt: int) -> Messages:
        return terse if (row % 2 == 1) != (attempt >= rounds // 2) else plain

    def judge(answer: Answer, others: Sequence[str]) -> Judgement:
        text = trim(answer)
        if not text:
            return "", "it has no full sentence"
        return ("", "it passes its check") if passes(example.check, text) else (text, "")

    return Prompt(key, messages, judge)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for anything the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_data.build", description="Make the demo set.")
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
        rows = build(model, tokenizer, options.out / ".prepare", options.seed)
    except PreftreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, path in paths.items():
        with atomic_file(path) as file:
            for row in rows[split]:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
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


if __name__ == "__main__":
    sys.exit(main())
