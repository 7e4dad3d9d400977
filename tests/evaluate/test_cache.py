"""The evaluation cache: never a stale answer, never the end of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from preftree.evaluate import cache
from preftree.evaluate.cache import RequestCache, model_key, request_key
from preftree.evaluate.harness import PreftreeLM
from tests.evaluate.conftest import asked
from tests.support import tiny

REQUESTS = [("w5 w6", " w7"), ("w5 w6", " w8 w9"), ("w10", " w11")]


def key(model: Any, **options: Any) -> str:
    lm = PreftreeLM(model, tokenizer=tiny.word_tokenizer(), **options)
    return model_key(lm.model, lm.settings)


def test_every_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    base = key(tiny.llama().float())
    assert key(tiny.llama().float()) == base
    keys = [
        base,
        key(tiny.llama(seed=1).float()),
        key(tiny.llama().double()),
        key(tiny.llama().float(), max_length=20),
        key(tiny.with_lora(tiny.llama().float())),
        key(tiny.with_lora(tiny.llama().float(), alpha=32)),  # the same weights, scaled otherwise
    ]
    monkeypatch.setattr(cache, "SCORING_VERSION", cache.SCORING_VERSION + 1)
    keys.append(key(tiny.llama().float()))
    monkeypatch.undo()
    monkeypatch.setattr(cache.transformers, "__version__", "0")
    keys.append(key(tiny.llama().float()))
    assert sorted({*keys}) == sorted(keys)


def test_buffers_that_are_not_saved_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama().float()
    before = model_key(model, {})
    model.model.rotary_emb.inv_freq.mul_(2)
    assert model_key(model, {}) != before


def test_the_scoring_path_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    base = key(tiny.llama().float())
    monkeypatch.setattr("preftree.evaluate.harness.can_stream", lambda scorer: (False, "no"))
    assert key(tiny.llama().float()) != base


def test_where_an_adapter_was_trained_does_not_count(tmp_path: Path) -> None:
    adapted = tiny.with_lora(tiny.llama().float())
    before = model_key(adapted, {})
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path)
    assert model_key(adapted, {}) == before


def answers(folder: Path, said: list[str] | None = None) -> list[tuple[float, bool]]:
    lm = PreftreeLM(tiny.llama().float(), tokenizer=tiny.word_tokenizer())
    lm.remember(RequestCache(folder, None if said is None else said.append))
    return lm.loglikelihood(asked("loglikelihood", REQUESTS))


def test_a_cache_that_cannot_be_written_costs_the_cache(tmp_path: Path) -> None:
    expected = answers(tmp_path / "good")
    (tmp_path / "file").write_text("")
    said: list[str] = []
    assert answers(tmp_path / "file" / "answers", said) == expected
    assert len(said) == 1
    assert "answers are not cached" in said[0]
    shutil.copytree(tmp_path / "good", tmp_path / "odd")
    (tmp_path / "odd" / "a.jsonl").mkdir()  # what cannot be read as a file
    assert answers(tmp_path / "odd", said) == expected


@pytest.mark.parametrize(
    "line",
    ["", "{", "null", "[]", '["a"]', '["KEY", null]', '["KEY", [NaN, true]]', '["KEY", ["x", 1, 2]]', "\x00\xff"],
)
def test_damaged_lines_are_not_answers(line: str, tmp_path: Path) -> None:
    first = request_key("loglikelihood", REQUESTS[0])
    (tmp_path / "a.jsonl").write_bytes(line.replace("KEY", first).encode("latin-1") + b"\n")
    found = answers(tmp_path)
    assert found == answers(tmp_path / "other")
    assert torch.tensor([logprob for logprob, _ in found]).isfinite().all()


def test_a_cache_that_disagrees_is_discarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = answers(tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps([name, [logprob - 1, greedy]]) + "\n" for name, (logprob, greedy) in lines))
    assert answers(tmp_path) == expected
    assert "discarded: it holds" in capsys.readouterr().err
    capsys.readouterr()
    assert answers(tmp_path) == expected  # what the last run wrote is right
    said = capsys.readouterr().err
    assert "discarded" not in said
    assert "3 of 3 loglikelihood requests were answered before" in said
