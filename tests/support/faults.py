"""Training runs with one planted fault each, through the real command on a tiny model: what reports must name."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from preftree.cli import main_train
from tests.support import tiny
from tests.support.command import TEMPLATE, command

#: Fault -> the findings that name it; a healthy run has none.
FAULTS: dict[str, set[str]] = {
    "healthy": set(),
    "half swapped": {"accuracy_stuck"},
    "labels random": {"accuracy_stuck"},
    "learning rate x 100": {"margin_exploding"},
    "chosen three times longer": {"length_bias"},
}
PAIRS, LEARNING_RATE = 240, 3e-3
#: Words of good and of bad answers: what there is to learn.
_GOOD, _BAD = range(10, 50), range(50, tiny.VOCABULARY)


def write_model(folder: Path, steps: int = 300) -> None:
    """The model that all runs start from: it has learned the language of `_answer`, so that it can be damaged."""
    model = tiny.llama(num_hidden_layers=2, initializer_range=0.02)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1) if parameter.dim() > 1 else parameter.fill_(1.0)
    tokenizer = tiny.word_tokenizer(TEMPLATE)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), random.Random(0)
    model.train()
    for _ in range(steps):
        texts = [f"{_question(draw)} {_answer(draw, draw.choice((_GOOD, _BAD)), 12, 12)}" for _ in range(32)]
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][-14:] for text in texts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _question(draw: random.Random) -> str:
    return " ".join(f"w{draw.randrange(10, tiny.VOCABULARY)}" for _ in range(draw.randint(3, 6)))


def _answer(draw: random.Random, kind: range, low: int, high: int) -> str:
    """Words of one kind in their order, each of which may be skipped."""
    place = draw.randrange(len(kind))
    words = []
    for _ in range(draw.randint(low, high)):
        words.append(f"w{kind[place % len(kind)]}")
        place += draw.choice((1, 1, 1, 2))
    return " ".join(words)


def write_pairs(path: Path, fault: str, seed: int) -> None:
    """Preference pairs: good words against bad words, of equal lengths on average, with a fault."""
    draw = random.Random(seed)
    longer = fault == "chosen three times longer"
    with path.open("w", encoding="utf-8") as file:
        for row in range(PAIRS):
            good = _answer(draw, _GOOD, 12, 18) if longer else _answer(draw, _GOOD, 4, 6)
            answers = [good, _answer(draw, _BAD, 4, 6)]
            swapped = (fault == "half swapped" and row % 2) or (fault == "labels random" and draw.random() < 0.5)
            chosen, rejected = reversed(answers) if swapped else answers
            pair = {"system": "", "question": _question(draw), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(pair) + "\n")


def train_with(fault: str, seed: int, model: Path, folder: Path) -> Path:
    """Train on such pairs; returns the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", fault, seed)
    inputs = folder / "inputs"
    inputs.mkdir()
    (inputs / "model").symlink_to(model, target_is_directory=True)
    (inputs / "pairs.jsonl").symlink_to(folder / "pairs.jsonl")
    rate = LEARNING_RATE * (100 if fault == "learning rate x 100" else 1)
    flags = command(
        inputs, folder / "run", learning_rate=rate, max_steps=24, logging_steps=2, save_steps=1000, seed=seed,
        per_device_train_batch_size=8, validation_split_percentage=20, warmup_steps=2,
    )  # fmt: skip
    assert main_train(flags) == 0
    return folder / "run"
