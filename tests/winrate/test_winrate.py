"""`preftree winrate`: a model against itself, judges with known habits, and what length control takes out."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from preftree.cli import app
from preftree.io.jsonl import read_jsonl
from preftree.winrate.judges import Verdict, both_orders, read_verdict, shares
from preftree.winrate.rates import win_rate
from tests.support import tiny
from tests.support.command import TEMPLATE

SHORT = ["--max_new_tokens", "6", "--use_cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, `a` and `b`, that answer differently, and `prompts.txt`."""
    folder = tmp_path_factory.mktemp("winrate")
    for seed, name in enumerate("ab"):
        tiny.llama(seed, num_hidden_layers=1).save_pretrained(folder / name)
        tiny.word_tokenizer(TEMPLATE).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("".join(f"w{i} w{i + 1}\n" for i in range(20, 28)))
    return folder


class _Judge(BaseHTTPRequestHandler):
    habit: ClassVar[str] = "longer"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        first, second = re.findall(r"\[Answer [AB]\]\n(.*?)\n\n", text, re.DOTALL)
        letter = {"first": "A", "mute": "?", "text": "A" if first > second else "B"}[self.habit]
        content = "no idea" if letter == "?" else f"Both were read. [[{letter}]]"
        data = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Judge) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/v1"
        served.shutdown()


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["winrate", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def test_a_model_against_itself_has_half(models: Path, tmp_path: Path) -> None:
    same = [models / "a", models / "a", "--prompts", models / "prompts.txt", "--judge", models / "b", *SHORT]
    code, said = command(*same, "--out", tmp_path / "greedy")
    assert code == 0, said
    result = json.loads((tmp_path / "greedy" / "winrate.json").read_text())
    assert (result["rate"], result["low"], result["high"], result["controlled"], result["ties"]) == (
        0.5,
        0.5,
        0.5,
        0.5,
        8,
    )
    code, said = command(*same, "--out", tmp_path / "sampled", "--temperature", "1", "--max_new_tokens", "3")
    assert code == 0, said
    result = json.loads((tmp_path / "sampled" / "winrate.json").read_text())
    rows = list(read_jsonl(tmp_path / "sampled" / "verdicts.jsonl"))
    assert any(row["a"] != row["b"] for row in rows)  # other seeds
    assert result["low"] <= 0.5 <= result["high"]


@pytest.mark.parametrize("habit", ["text", "first", "mute"])
def test_a_server_judges_in_both_orders(
    habit: str, models: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Judge, "habit", habit)
    words = [models / "a", models / "b", "--prompts", models / "prompts.txt", "--judge", server, "--judge_model", "J"]
    code, said = command(*words, *SHORT, "--out", tmp_path / "out")
    assert code == 0, said
    rows = list(read_jsonl(tmp_path / "out" / "verdicts.jsonl"))
    if habit == "text":
        assert [row["share"] for row in rows] == [float(row["a"] > row["b"]) for row in rows]
        assert {row["share"] for row in rows} == {0.0, 1.0}
    else:
        assert {row["share"] for row in rows} == {0.5}
        words_of = {"first": "8 ties are verdicts that changed", "mute": "8 verdicts could not be read"}
        assert words_of[habit] in said


def test_verdicts() -> None:
    assert read_verdict("I first thought [[A]], but [[B]]").share == 0.0
    assert read_verdict("neither").share is None
    asked = both_orders([("q", "one", "two")])
    assert [(each.first, each.second) for each in asked] == [("one", "two"), ("two", "one")]
    given = [Verdict(a, "") for a in (1.0, 0.0, 1.0, 1.0, 0.5, 0.5, 1.0, 0.5, None, 0.0)]
    assert [row["share"] for row in shares(given)] == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert [row["flipped"] for row in shares(given)] == [False, True, False, False, False]


def test_length_control_takes_a_preference_for_length_out() -> None:
    """Verdicts that depend on length alone: A is mostly longer and wins, and has half at equal length."""
    random = np.random.default_rng(0)
    longer = random.normal(30, 40, 600)
    share = (random.random(600) < 1 / (1 + np.exp(-longer / 15))).astype(float)
    found = win_rate(share, 100 + longer, np.full(600, 100.0))
    assert found.rate > 0.65
    assert found.controlled_low < 0.5 < found.controlled_high
    assert abs(found.controlled - 0.5) < 0.08
    fair = win_rate((random.random(600) < 0.7).astype(float), 100 + random.normal(0, 40, 600), np.full(600, 100.0))
    assert fair.low < 0.7 < fair.high
    assert abs(fair.controlled - fair.rate) < 0.03


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "name two models"),
        (["a", "b", "--prompts", "p.txt"], "--judge is missing"),
        (["a", "b", "--judge", "a"], "--prompts is missing"),
        (["a", "b", "--judge", "http://x/v1", "--prompts", "prompts.txt"], "--judge_model is missing"),
        (["a", "b", "--judge", "ftp://x/v1", "--judge_model", "J", "--prompts", "prompts.txt"], "must begin with http"),
        (["a", "b", "--judge", "./none", "--prompts", "prompts.txt"], "no such folder"),
        (["./none", "b", "--judge", "b", "--prompts", "prompts.txt"], "no such folder"),
        (["a", "b", "--judge", "b", "--prompts", "prompts.txt", "--out", "prompts.txt"], "is a file"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], message: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    code, said = command(*words)
    assert (code, message in said) == (2, True), said
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "prompts.txt"]


def test_a_prompt_that_a_template_refuses_is_one_sentence(models: Path, tmp_path: Path) -> None:
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    refusing = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages %}{% if 'w99' in m['content'] %}"
                                "{{ raise_exception('not this') }}{% endif %}")  # fmt: skip
    tiny.word_tokenizer(refusing).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("w99 w20\n")
    words = ["winrate", str(tmp_path / "model"), str(models / "b"), "--prompts", str(tmp_path / "prompts.txt")]
    result = CliRunner().invoke(app, [*words, "--judge", str(models / "a"), *SHORT])
    assert result.exit_code == 2
    assert "the chat template cannot render 'w99 w20': not this" in result.output + result.stderr
