"""Folders as `preftree evaluate` and lm-eval write them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def sample(number: int, value: float, metric: str = "acc") -> dict[str, Any]:
    hashes = {"doc_hash": f"d{number}", "prompt_hash": "p", "target_hash": "t"}
    return {"doc_id": number, "metrics": [metric], metric: value, "doc": {"question": f"Why {number}?"}, **hashes}


def write_evaluation(place: Path, values: list[float], name: str = "model", task: str = "toy", **more: Any) -> Path:
    """A folder as lm-eval writes it, with one task of questions scored 0 or 1."""
    place.mkdir(parents=True)
    results = {"configs": {task: {}}, "config": {"model_args": {"pretrained": name}}, "versions": {task: 1}, **more}
    (place / "results_2026.json").write_text(json.dumps(results))
    rows = "".join(json.dumps(sample(number, value)) + "\n" for number, value in enumerate(values))
    (place / f"samples_{task}_2026.jsonl").write_text(rows)
    return place


def write_heldout(place: Path, margins: list[float], first: int = 0) -> None:
    rows = [{"pair": str(first + i), "chosen": -5.0, "rejected": -5.0 - margin} for i, margin in enumerate(margins)]
    (place / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
