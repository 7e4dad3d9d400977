"""README's "To change X, open Y", followed: one of each is added by a function and a line in its dict, and it works."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from preftree.check.report import Measure
from preftree.check.rows import ROW_CHECKS
from preftree.check.run import check
from preftree.check.tokens import TOKEN_CHECKS
from preftree.config import dpo
from preftree.config.check import parse_check_settings
from preftree.data.formats import FORMATS, Format
from preftree.data.record import PreferenceRecord, Response, Turn
from preftree.data.sources import load_pairs
from preftree.forest import Bundle, Forest
from preftree.model.attention import BACKENDS, Backend, dense
from preftree.model.families import FAMILIES, interface
from preftree.model.score import attach, leaf_logprobs
from preftree.train.losses import LOSSES, Loss, LossSettings, PairLogps
from tests.support import tiny
from tests.support.training import PAIRS, make_model, make_trainer, one_step

FOREST = Forest.of([Bundle((5, 6, 7, 8), ((9, 10), (11, 12, 13)), (0, 1)), Bundle((14, 15), ((16,),), (2,))])


def test_a_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def exponential(logps: PairLogps, settings: LossSettings) -> Tensor:
        return torch.exp(-settings.beta * (logps.chosen_ratio_P - logps.rejected_ratio_P))

    monkeypatch.setitem(LOSSES, "exponential", Loss(exponential))
    monkeypatch.setattr(dpo, "LOSS_TYPES", (*dpo.LOSS_TYPES, "exponential"))
    loss, _ = one_step(make_trainer(make_model(trained=False), tmp_path, loss_type="exponential"), PAIRS)
    assert loss == pytest.approx(1.0)  # e⁰: policy and reference are one
    trained, gradients = one_step(make_trainer(make_model(), tmp_path, loss_type="exponential"), PAIRS)
    assert abs(trained - 1) > 0.01
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients.values())


def test_an_attention_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def attend(*arguments: Any) -> Tensor:
        calls.append(len(arguments[3]))
        return dense.attend(*arguments)

    monkeypatch.setitem(BACKENDS, "mine", Backend(attend))
    model = tiny.llama()
    with attach(model, "dense") as scorer:
        expected = leaf_logprobs(scorer, FOREST)
    with attach(model, "mine") as scorer:
        assert scorer.name == "mine"
        calls.clear()
        assert torch.equal(leaf_logprobs(scorer, FOREST).sum_L, expected.sum_L)
    assert calls == [len(FOREST)] * model.config.num_hidden_layers


def test_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []

    def prepare(model: Any, patches: Any) -> Any:
        prepared.append(model.config.model_type)
        return interface.prepare(model, patches)

    monkeypatch.setitem(FAMILIES, "llama", prepare)
    with attach(tiny.llama(), "dense") as scorer:
        assert scorer.shares_prompts
    assert set(prepared) == {"llama"}


def test_a_data_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read(row: dict[str, Any]) -> PreferenceRecord:
        answers = (Response(row["good"], rank=1), Response(row["bad"], rank=2))
        return PreferenceRecord(None, (Turn("user", row["ask"]),), answers)

    columns = ("ask", "good", "bad")
    monkeypatch.setitem(FORMATS, "mine", Format(columns, lambda there: set(columns) <= set(there), read))
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"ask": "Why?", "good": "So.", "bad": "No."}) + "\n")
    loaded = load_pairs(str(path))
    assert loaded.format == "mine"
    assert [(pair.turns[0].content, pair.chosen, pair.rejected) for pair in loaded] == [("Why?", "So.", "No.")]


def test_checks_of_rows_and_tokens(monkeypatch: pytest.MonkeyPatch, samples: Path) -> None:
    def long_prompt(record: PreferenceRecord, pairs: list[Any]) -> bool:
        return len(record.turns[-1].content) > 2000

    monkeypatch.setitem(ROW_CHECKS, "long_prompt", (long_prompt, Measure("prompts above 2,000 characters", "slow")))
    monkeypatch.setitem(TOKEN_CHECKS, "everything", (lambda fate: True, Measure("pairs that have tokens", "always")))
    monkeypatch.setattr("preftree.model.load.load_tokenizer", lambda *_, **__: tiny.word_tokenizer())
    path = samples / "pref" / "orca_pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    settings = parse_check_settings([str(path), "--model_name_or_path", "x"])
    found = {finding.key: finding for finding in check(settings, Console(file=io.StringIO()))[0].findings}
    assert found["long_prompt"].count == sum(len(row["question"]) > 2000 for row in rows) > 0
    assert found["everything"].count == len(rows)
