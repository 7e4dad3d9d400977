"""`preftree chat` and `preftree samples` through the real commands, on one tiny run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from preftree.chat.talk import Talk, VoteFile
from preftree.cli import app
from preftree.config.answers import AnswerSettings, ChatSettings
from preftree.data.sources import load_pairs
from preftree.errors import RunError
from preftree.io.console import sayer
from preftree.io.jsonl import read_jsonl
from preftree.samples.opened import OpenRun, open_run
from tests.support import tiny
from tests.support.command import TEMPLATE, write_inputs

SHORT = ["--max_new_tokens", "6", "--use_cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that changes answers, with a run's settings."""
    inputs = write_inputs(tmp_path_factory.mktemp("chat"), pairs=6)
    folder = inputs / "run"
    model = tiny.with_lora(tiny.llama(num_hidden_layers=2), seed=4)
    model.peft_config["default"].base_model_name_or_path = str(inputs / "model")
    model.save_pretrained(str(folder))
    tiny.word_tokenizer(TEMPLATE).save_pretrained(folder)
    settings = {
        "model": {"model_name_or_path": str(inputs / "model")},
        "data": {"dataset_name": str(inputs / "pairs.jsonl")},
    }
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps({"fingerprint": "x", "settings": settings}))
    return folder


def command(*words: object, lines: Sequence[str] = ()) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)], input="".join(f"{line}\n" for line in lines))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def opened(run: Path) -> OpenRun:
    settings = AnswerSettings(str(run), dtype="float32", use_cpu=True, device="cpu", max_new_tokens=6)
    return open_run(settings, sayer(Console(quiet=True)))


def test_votes_are_pairs_that_training_reads(run: Path, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    lines = ["w20 w21 w22", "1", "w23", "2", "w24", "=", "/system w30 w31", "w40", "2", "/quit"]
    code, said = command("chat", run, "--votes", votes, *SHORT, lines=lines)
    assert code == 0, said
    rows = list(read_jsonl(votes))
    assert [row["provenance"]["chosen_by"] for row in rows] == ["base", "trained", "trained"]
    first, second, third = rows
    assert first["prompt"] == [{"role": "user", "content": "w20 w21 w22"}]
    # The conversation went on from the answer that was voted for.
    assert second["prompt"][1:] == [first["chosen"][0], {"role": "user", "content": "w23"}]
    assert third["prompt"][0] == {"role": "system", "content": "w30 w31"}
    pairs = load_pairs(str(votes))
    assert [pair.chosen for pair in pairs] == [row["chosen"][0]["content"] for row in rows]
    assert [pair.system for pair in pairs] == [None, None, "w30 w31"]
    assert "2 for the trained model, 1 for the base, 1 ties" in said
    assert f"preftree train --model_name_or_path {run.parent / 'model'} --dataset_name {votes}" in said


def test_a_line_that_is_no_vote_is_the_next_turn(run: Path, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    code, said = command(
        "chat", run, "--votes", votes, *SHORT, lines=["w20", "w21", "/help", "/set top_p 3", "/nothing"]
    )
    assert code == 0
    assert said.count("trained: ") == 2
    assert "top_p cannot be 3" in said
    assert not votes.exists()
    code, said = command("chat", run, *SHORT, lines=["w20", "1"])  # the default place, and the end of the input
    assert len(list(read_jsonl(run / "run" / "votes.jsonl"))) == 1


def test_a_blind_vote_shuffles_sides_and_names_them_afterwards(opened: OpenRun) -> None:
    talk = Talk(opened, blind=True)
    exchanges = [talk.ask(f"w{i}", lambda place, text: None) for i in range(20, 28)]
    assert {exchange.order for exchange in exchanges} == {("base", "trained"), ("trained", "base")}
    flipped = next(exchange for exchange in exchanges if exchange.order[0] == "trained" and not exchange.same)
    pair = talk.vote(flipped, 0)
    assert pair is not None
    assert pair["provenance"]["chosen_by"] == "trained"
    assert pair["chosen"][0]["content"] == flipped.answers["trained"].text


def test_streaming_is_generation(opened: OpenRun) -> None:
    ids = opened.ids(opened.messages(Talk(opened).turns or (turn("w20 w21"),), None))
    for side in ("base", "trained"):
        seen: list[str] = []
        answer = opened.stream(side, ids, 0, seen.append)
        assert answer == opened.answers(side, [ids], 1)[0]
        assert seen[-1].strip() == answer.text
        assert len(seen) > 1
    assert opened.answers("base", [ids], 1) != opened.answers("trained", [ids], 1)


def turn(text: str) -> object:
    from preftree.data.record import Turn

    return Turn("user", text)


def test_on_a_terminal_answers_are_side_by_side(run: Path, opened: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftree.chat.run import run as chat

    lines = iter(["w20 w21", "2"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("preftree.chat.run.open_run", lambda settings, say: opened)
    for width in (80, 120):
        out = StringIO()
        lines = iter(["w20 w21", "2"])
        chat(
            ChatSettings(str(run), max_new_tokens=6),
            Console(file=out, width=width, force_terminal=True, color_system=None),
        )
        drawn = [line for line in out.getvalue().splitlines() if line.startswith("┃")]
        assert drawn
        assert all(len(line) == width for line in drawn)


def test_samples_beside_each_other(run: Path, tmp_path: Path) -> None:
    page, rows = tmp_path / "samples.html", tmp_path / "samples.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w20 w21\n\nw22 <script>\n")
    code, said = command("samples", run, "--prompts", prompts, "--html", page, "--jsonl", rows, *SHORT)
    assert code == 0, said
    assert "2. w22 <script>" in said
    assert "&lt;script&gt;" in page.read_text()
    assert "<script>" not in page.read_text()
    assert "<mark>" in page.read_text()
    first, _ = read_jsonl(rows)
    assert first["base"] != first["trained"]
    assert first["prompt"] == [{"role": "user", "content": "w20 w21"}]
    assert f"preftree chat {run}" in said


def test_samples_of_the_runs_own_data(run: Path) -> None:
    code, said = command("samples", run, "--limit", "2", *SHORT)
    assert code == 0, said
    assert "prompts    2 (" in said
    assert "pairs.jsonl, the data of the run" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat", "nowhere"], "nowhere: no such folder"),
        (["chat"], "name the folder of a run"),
        (["chat", "RUN", "--top_p", "0"], "--top_p must be above 0"),
        (["chat", "RUN", "--votes", "mine.txt"], "--votes must be a .jsonl file"),
        (["chat", "RUN", "--votes", "other.jsonl"], "holds other rows than preference pairs"),
        (["chat", "RUN", "--model", "./nowhere"], "no such folder"),
        (["samples", "RUN", "--prompts", "nothing.txt"], "nothing.txt"),
        (["samples", "RUN", "--prompts", "empty.txt"], "there is no prompt in it"),
        (["samples", "RUN", "--html", "other.jsonl"], "exists and is not overwritten"),
        (["samples", "RUN", "--limit", "0"], "--limit must be at least 1"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.txt").write_text("\n")
    code, said = command(*[str(run) if word == "RUN" else word for word in words])
    assert (code, message in said) == (2, True), said
    assert (tmp_path / "other.jsonl").read_text() == '{"a": 1}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "other.jsonl"]


def test_a_vote_file_keeps_its_pairs(tmp_path: Path) -> None:
    file = VoteFile(tmp_path / "votes.jsonl")
    file.add({"prompt": [], "chosen": [], "rejected": []})
    assert VoteFile(tmp_path / "votes.jsonl").count == 1
    with pytest.raises(RunError, match="there is no folder"):
        VoteFile(tmp_path / "no" / "votes.jsonl")
