"""Held-out pairs: what is dropped or cut is said before anything is computed, and memory does not end the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from preftree.data.encode import encode_pairs
from preftree.data.sources import load_pairs
from preftree.errors import DataError, ModelError
from preftree.evaluate import preference
from preftree.evaluate.heldout import DETAILS, read_heldout
from preftree.evaluate.preference import AnswerTooLong, score_pairs
from preftree.forest import Forest
from preftree.model.score import attach
from tests.support import tiny


def write(path: Path, rows: list[tuple[str, str, str]]) -> str:
    path.write_text(
        "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), r, strict=True))) + "\n" for r in rows)
    )
    return str(path)


def text(count: int, start: int = 5) -> str:
    return " ".join(f"w{start + i % 80}" for i in range(count))


@pytest.fixture
def never_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test once a task is evaluated."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the tasks were evaluated")

    monkeypatch.setattr("preftree.evaluate.run.simple_evaluate", fail)


@pytest.mark.usefixtures("never_scored")
def test_pairs_that_are_too_long_are_refused_as_questions_are(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.jsonl", [(text(5), text(3), text(4)), (text(70), text(9), text(8))])
    with pytest.raises(ModelError, match=r"1 of 2 held-out pairs are longer than the model's 64 positions.*p.jsonl:2"):
        evaluated("out", preferences=pairs, max_length=64)


@pytest.mark.usefixtures("never_scored")
def test_none_left_is_told_before_the_tasks(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    same = write(tmp_path / "p.jsonl", [(text(5), text(3), text(3)), (text(5), text(4), " ")])
    with pytest.raises(DataError, match=r"none of its 2 pairs can be scored \(.*identical: 1"):
        evaluated("out", preferences=same)


def test_what_is_dropped_or_cut_is_counted(
    evaluated: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(text(5), text(3), text(4)), (text(5), text(3), text(3)), (text(900), text(9), text(8))]
    rows += [(text(9), text(3, 20), text(5))]
    folder = evaluated("out", preferences=write(tmp_path / "p.jsonl", rows), max_length=800, truncate=True, limit=3)
    said = capsys.readouterr().err
    assert "1 of 3 held-out pairs are longer than the model's 800 positions" in said
    assert "1 of 3 held-out pairs are dropped (chosen and rejected are identical: 1)" in said
    report = json.loads((folder / "preferences.json").read_text())
    assert (report["read"], report["pairs"], report["cut"]) == (3, 2, 1)  # --limit counts for pairs as well
    found = read_heldout(folder)
    assert found is not None
    assert len(found.keys) == 2
    assert report["margin"] == pytest.approx(found.margin_P.mean())
    assert len((folder / DETAILS).read_text().splitlines()) == 2


def test_one_word_about_a_file_that_is_not_there(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError):
        evaluated("out", preferences=str(tmp_path / "none.jsonl"))


# --- memory ---------------------------------------------------------------------------------------


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Lets no forest of more than `most` tokens be scored; returns the sizes that were."""
    score, sizes = preference.leaf_logprobs, list[int]()

    def scored(scorer: Any, forest: Forest) -> Any:
        if len(forest) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(forest))
        return score(scorer, forest)

    monkeypatch.setattr(preference, "leaf_logprobs", scored)
    return sizes


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    rows = [(text(10 + 3 * i, 5 + i), text(4 + i), text(9, 30 + i)) for i in range(8)]
    rows += [(text(30), text(2 + i, 40), text(3, 50 + i)) for i in range(4)]
    file = write(tmp_path_factory.mktemp("pairs") / "p.jsonl", rows)
    return encode_pairs(load_pairs(file), tiny.word_tokenizer(), max_length=200, max_prompt_length=100)[0]


@pytest.mark.parametrize("most", [150, 60, 48])
def test_out_of_memory_halves_the_budget_and_redoes_the_forest(
    most: int, pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = attach(tiny.llama().double())
    expected = score_pairs(scorer, pairs, 500)
    sizes, budgets = small_memory(monkeypatch, most), list[int]()
    found = score_pairs(scorer, pairs, 500, shrunk=budgets.append)
    assert found.chosen_P == pytest.approx(expected.chosen_P, abs=1e-10)
    assert found.rejected_P == pytest.approx(expected.rejected_P, abs=1e-10)
    assert budgets
    assert budgets == sorted(budgets, reverse=True)
    assert max(sizes) <= most


def test_only_an_answer_that_does_not_fit_by_itself_stops(pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = attach(tiny.llama().double())
    longest = max(range(len(pairs)), key=lambda i: len(pairs[i].prompt_ids) + len(pairs[i].rejected_ids))
    small_memory(monkeypatch, len(pairs[longest].prompt_ids) + len(pairs[longest].rejected_ids) - 1)
    with pytest.raises(AnswerTooLong) as caught:
        score_pairs(scorer, pairs, 500)
    assert caught.value.leaf // 2 == longest


def test_other_errors_are_not_taken_for_it(pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(preference, "leaf_logprobs", fail)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        score_pairs(attach(tiny.llama()), pairs)
