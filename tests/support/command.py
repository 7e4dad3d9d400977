"""The real command on a tiny model folder: what it is given, and what is read from what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny

TEMPLATE = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant ' }}{% endif %}"
)


def write_inputs(folder: Path, pairs: int = 12) -> Path:
    """Put a model and a file of preference pairs into `folder`; some questions come twice."""
    tiny.llama(num_hidden_layers=2).save_pretrained(folder / "model")
    tiny.word_tokenizer(TEMPLATE).save_pretrained(folder / "model")
    random = torch.Generator().manual_seed(3)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (1,), generator=random))
        ids = torch.randint(10, tiny.VOCABULARY, (length,), generator=random)
        return " ".join(f"w{i}" for i in ids.tolist())

    system, questions = words(12, 12), [words(2, 5) for _ in range(2 * pairs // 3)]
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(pairs):
            row = {
                "system": system,
                "question": questions[i % len(questions)],
                "chosen": words(2, 6),
                "rejected": words(2, 6),
            }
            file.write(json.dumps(row) + "\n")
    return folder


def ranked_rows(count: int = 10) -> list[dict[str, Any]]:
    """Prompts with two to five scored answers each."""
    random = torch.Generator().manual_seed(2)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (1,), generator=random))
        return " ".join(f"w{i}" for i in torch.randint(10, tiny.VOCABULARY, (length,), generator=random).tolist())

    return [
        {"prompt": words(2, 6), "responses": [words(1, 6) for _ in range(k)], "scores": [(7 * j) % k for j in range(k)]}
        for k in (2 + i % 4 for i in range(count))
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(inputs: Path, output: Path, **flags: object) -> list[str]:
    """The flags of a short run, with others in their place or beside them."""
    settings: dict[str, object] = {
        "model_name_or_path": inputs / "model",
        "dataset_name": inputs / "pairs.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "lora_rank": 4,
        "torch_dtype": "float32",
        "validation_split_percentage": 20,
        "lr_scheduler_type": "cosine",
        "use_cpu": "true",
        "seed": 1,
        **flags,
    }
    return [piece for name, value in settings.items() for piece in (f"--{name}", *str(value).split(" "))]


def history(output: Path) -> list[dict[str, Any]]:
    """The log records of a run, training, evaluation and the last one."""
    return json.loads((output / "trainer_state.json").read_text())["log_history"]  # type: ignore[no-any-return]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in history(output) if "loss" in record]
