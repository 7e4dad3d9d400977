"""Rows of an instruction set, the command `preftree prepare` on a tiny model, and workers that finish out of order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from preftree.cli import app

SYSTEMS = ["", "w20 w21", "w22"]


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in OpenOrca's columns whose questions have nothing in common."""
    rng = random.Random(seed)
    shares = {"flan": 8, "t0": 4, "cot": 2, "niv": 1}
    made = []
    for number in range(count):
        (family,) = rng.choices(list(shares), list(shares.values()))
        words = [f"w{rng.randrange(30, 97)}" for _ in range(rng.randint(8, 14))]
        text = " ".join(words)
        row = {"id": f"{family}.{number}", "system_prompt": rng.choice(SYSTEMS), "question": text}
        made.append(row | {"response": " ".join(words[:4])})
    return made


def write(path: Path, content: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    return path


def flags(inputs: Path, out: Path, **more: Any) -> list[str]:
    options = {
        "dataset_name": inputs / "source.jsonl",
        "model_name_or_path": inputs / "model",
        "output_dir": out,
        "num_samples": 20,
        "max_new_tokens": 6,
        "batch_size": 8,
        "cut_answers": "keep",
        "use_cpu": True,
        "torch_dtype": "float32",
        **more,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def command(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["prepare", *words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


class Backwards:
    """Workers that finish last what came first."""

    def map(self, make, items: Iterable) -> Iterator[tuple[int, object]]:
        work = make()
        yield from reversed([(number, work(item)) for number, item in enumerate(items)])
