"""K answers to a prompt through the real command: the run is that of its pairs written out, for fewer tokens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preftree.cli import main_train
from tests.support import tiny
from tests.support.command import command, history, losses

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")

#: Of each prompt; two are tied, and one prompt has no better answer at all.
SCORES = ((5, 3, 3, 1), (2, 4, 1), (1, 1), (7, 8, 9, 6))


def rows() -> list[dict[str, Any]]:
    rng = random.Random(5)

    def words(most: int) -> str:
        return " ".join(f"w{rng.randrange(10, tiny.VOCABULARY)}" for _ in range(rng.randint(3, most)))

    return [{"prompt": words(8), "responses": [words(9) for _ in scores], "scores": list(scores)} for scores in SCORES]


def written_out(rule: str) -> Iterator[dict[str, str]]:
    """The pairs that a rule means, found by comparing answers one with another."""
    for row in rows():
        answers = list(zip(row["scores"], row["responses"], strict=True))
        best = max(row["scores"])
        for better, chosen in answers:
            for worse, rejected in answers:
                if better > worse and (rule == "all" or better == best):
                    yield {"system": "", "question": row["prompt"], "chosen": chosen, "rejected": rejected}


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize(("rule", "count"), [("best_each", 8), ("all", 14)])
def test_a_run_on_ranked_answers_is_that_of_its_pairs(inputs: Path, tmp_path: Path, rule: str, count: int) -> None:
    pairs = list(written_out(rule))
    assert len(pairs) == count
    # All pairs in a step, since their order is not the same.
    flags: dict[str, Any] = {"per_device_train_batch_size": count, "max_steps": 3, "validation_split_percentage": 0}
    ranked = write(tmp_path / "ranked.jsonl", rows())
    apart = write(tmp_path / "pairs.jsonl", pairs)
    assert main_train(command(inputs, tmp_path / "A", dataset_name=ranked, pair_rule=rule, **flags)) == 0
    assert main_train(command(inputs, tmp_path / "B", dataset_name=apart, **flags)) == 0
    found, expected = losses(tmp_path / "A"), losses(tmp_path / "B")
    assert len(found) == 3
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.005


def test_steps_of_fewer_pairs_keep_the_pairs_of_a_prompt_together(inputs: Path, tmp_path: Path) -> None:
    ranked = write(tmp_path / "ranked.jsonl", [rows()[0], rows()[3]])
    flags: dict[str, Any] = {"per_device_train_batch_size": 3, "max_steps": 2, "validation_split_percentage": 0}
    flags |= {"pair_rule": "best_each", "dataset_name": ranked}
    assert main_train(command(inputs, tmp_path / "O", **flags)) == 0
    saved = [record["tokens_saved"] for record in history(tmp_path / "O") if "tokens_saved" in record]
    # A prompt with its best answer and three others: those four and the prompt once, where pairs have six and six.
    assert len(saved) == 2
    assert min(saved) > 0.45
