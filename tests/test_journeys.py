"""From one's own data and model to files for another runtime, through the real commands, without a network.

One process runs them all, as their imports are most of their time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from peft import PeftConfig
from typer.testing import CliRunner

from preftree.cli import app
from preftree.data.sources import load_pairs
from tests.support.command import command as train_flags
from tests.support.command import write_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")
CONVERTER = Path(__file__).parent / "export" / "converter.py"
SHORT = ["--max_new_tokens", "5", "--use_cpu", "--dtype", "float32"]


def preftree(*words: object, lines: Sequence[str] = (), code: int = 0) -> str:
    """What a command says; it must end with `code`."""
    result = CliRunner().invoke(app, [*map(str, words)], input="".join(f"{line}\n" for line in lines))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `pairs.jsonl`, and `run`, which was trained on them."""
    inputs = write_inputs(tmp_path_factory.mktemp("journey"))
    said = preftree("check", inputs / "pairs.jsonl", "--model_name_or_path", inputs / "model")
    assert f"preftree train --model_name_or_path {inputs / 'model'} --dataset_name {inputs / 'pairs.jsonl'}" in said
    said = preftree("train", *train_flags(inputs, inputs / "run", lr_scheduler_type="constant", learning_rate=2e-2))
    for word in ("trained    4 steps", "loss  ", "held out   accuracy", "model card (README.md)"):
        assert word in said
    run, scores, merged = inputs / "run", inputs / "run-scores", inputs / "run-merged"
    assert said.split("next       ")[1].split("\n") == [
        f"preftree chat {run}",
        f"           preftree samples {run}",
        f"           preftree report {run}",
        f"           preftree evaluate --model {inputs / 'model'} --adapter {run} --out {scores}",
        f"           preftree merge {run} --out {merged}",
        "",
    ]
    return inputs


def test_own_data_and_model(place: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert "answers changed" in preftree("samples", "run", "--limit", "2", *SHORT)
    said = preftree("chat", "run", *SHORT, lines=["w20 w21", "2", "w22", "1", "/quit"])
    assert "2 preference pairs" in said
    said = preftree("merge", "run", "--out", "run-merged")
    assert said.count("verified   ") == 4
    questions = [
        "--tasks",
        "truthfulqa_mc2",
        "--data",
        samples / "eval",
        "--limit",
        "2",
        "--num_fewshot",
        "0",
        "--use_cpu",
    ]
    heldout = ["--preferences", "pairs.jsonl", "--dtype", "float32", "--max_length", "4096"]
    said = preftree("evaluate", "--model", "model", "--adapter", "run", "--out", "scores", *questions, *heldout)
    assert "preftree compare scores-base scores" in said
    said = preftree("evaluate", "--model", "model", "--out", "scores-base", *questions, *heldout)
    assert "2 held-out pairs" in said  # --limit
    assert "preftree merge run --out run-merged" in preftree("compare", "scores-base", "scores", "--out", "table")
    assert "held-out" in (place / "table" / "compare.md").read_text().lower()
    said = preftree(
        "export", "run-merged", "--to", "gguf", "--out", "run.gguf", "--converter", CONVERTER, "--gguf_type", "f32"
    )
    assert "verified   log-probs" in said


def test_votes_are_trained_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = [word for turn in range(20, 26) for word in (f"w{turn} w{turn + 1}", "1" if turn % 2 else "2", "/new")]
    preftree("chat", "run", "--votes", "votes.jsonl", *SHORT, lines=lines)
    assert len(load_pairs("votes.jsonl")) > 2
    flags = train_flags(place, place / "second", validation_split_percentage=0, max_steps=1, save_strategy="no")
    flags[flags.index(str(place / "pairs.jsonl"))] = "votes.jsonl"
    assert "trained    1 steps" in preftree("train", *flags)


def test_from_the_run_folder_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder in another place, from another folder, without the data."""
    run = tmp_path / "elsewhere"
    shutil.copytree(place / "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert PeftConfig.from_pretrained(str(run)).base_model_name_or_path == str(place / "model")
    (tmp_path / "prompts.txt").write_text("w20 w21\n")
    assert "1 (prompts.txt)" in preftree("samples", "elsewhere", "--prompts", "prompts.txt", *SHORT)
    config = json.loads((run / "run" / "config.json").read_text())
    config["settings"]["data"]["dataset_name"] = str(tmp_path / "gone.jsonl")
    (run / "run" / "config.json").write_text(json.dumps(config))
    assert "built-in ones" in preftree("merge", "elsewhere", "--out", "merged")
    said = preftree("samples", "elsewhere", *SHORT, code=2)
    assert "gone.jsonl" in said


def test_a_run_goes_on_by_its_name_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    preftree("train", *train_flags(place, place / "whole"))
    preftree("train", *train_flags(place, place / "half"))
    for name in ("checkpoint-4", "adapter_model.safetensors", "run/finished.json"):  # as a kill after step 2 leaves it
        path = place / "half" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = preftree("train", "--resume", "half")
    assert "trained    4 steps" in said
    weights = [(place / name / "adapter_model.safetensors").read_bytes() for name in ("half", "whole")]
    assert weights[0] == weights[1]
    assert "nothing was computed" in preftree("train", "--resume", "half")
