"""The real command on a tiny model folder: what it leaves behind, what must be equal, and how it refuses."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from preftree.cli import main_train
from tests.support import tiny
from tests.support.command import TEMPLATE, command, losses

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


@pytest.fixture(scope="module")
def done(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole run."""
    output = tmp_path_factory.mktemp("runs") / "4x1"
    assert main_train(command(inputs, output)) == 0
    return output


def test_what_a_run_leaves(done: Path, inputs: Path) -> None:
    names = {path.name for path in done.iterdir()}
    expected = {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "tokenizer.json"}
    assert expected | {"run", "checkpoint-2", "checkpoint-4"} <= names
    assert {"config.json", "env.json", "metrics.jsonl"} <= {path.name for path in (done / "run").iterdir()}
    assert not list(done.rglob("training_args.bin"))

    history = json.loads((done / "trainer_state.json").read_text())["log_history"]
    trained = [record for record in history if "loss" in record]
    assert [record["step"] for record in trained] == [1, 2, 3, 4]
    assert trained[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert any("eval_rewards/accuracies" in record for record in history)
    lines = [json.loads(line) for line in (done / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [record["loss"] for record in trained]

    tokenizer = AutoTokenizer.from_pretrained(str(done))
    assert tokenizer.chat_template == TEMPLATE
    model = PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), str(done)).eval()
    ids = torch.tensor([tokenizer("w20 w21 w22", add_special_tokens=False)["input_ids"]])
    assert ids.tolist() == [[20, 21, 22]]
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, base, atol=1e-3)
    assert json.loads((done / "adapter_config.json").read_text())["base_model_name_or_path"] == str(inputs / "model")


@pytest.mark.parametrize(
    "flags",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"tokens_per_forest": 1},
        {"gradient_checkpointing": "true"},
        {"attention": "padded"},
    ],
    ids=["2x2", "1x4", "one pair per forest", "checkpointing", "padded"],
)
def test_runs_that_must_be_equal(inputs: Path, done: Path, tmp_path: Path, flags: dict[str, object]) -> None:
    assert main_train(command(inputs, tmp_path / "O", **flags)) == 0
    expected, found = losses(done), losses(tmp_path / "O")
    assert found == pytest.approx(expected, abs=1e-4)
    assert sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(found) < 2e-5
    assert max(expected) - min(expected) > 0.01


def test_another_seed_is_another_run(inputs: Path, done: Path, tmp_path: Path) -> None:
    """The comparison above would notice a difference."""
    assert main_train(command(inputs, tmp_path / "O", seed=2)) == 0
    drift = [abs(a - b) for a, b in zip(losses(done), losses(tmp_path / "O"), strict=True)]
    assert max(drift) > 1e-3


def test_named_targets_without_dropout_left_on(inputs: Path, tmp_path: Path) -> None:
    flags = {"lora_all_linear": "false", "lora_target_modules": "k_proj q_proj v_proj", "lora_dropout": 0.5}
    assert main_train(command(inputs, tmp_path / "O", max_steps=1, **flags)) == 0
    config = json.loads((tmp_path / "O" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    assert losses(tmp_path / "O") == [pytest.approx(math.log(2), abs=1e-6)]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written and what it holds."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_with_another_run_is_left_alone(inputs: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(done)
    assert main_train(command(inputs, done, beta=0.3)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output_dir {done} holds another run")
    assert "--overwrite_output_dir" in error
    assert snapshot(done) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model_name_or_path": "{inputs}/modle"}, ["no such folder", "Did you mean model?"]),
        ({"model_name_or_path": "{tmp}/empty"}, ["has no config.json", "it holds nothing"]),
        ({"model_name_or_path": "{inputs}/pairs.jsonl"}, ["is a file"]),
        ({"model_name_or_path": "nobody/no-such-model"}, ["nobody/no-such-model", "network"]),
        (
            {"lora_all_linear": "false", "lora_target_modules": "q_porj"},
            ["q_porj matches no module", "Did you mean", "q_proj (2)", "lm_head (1)"],
        ),
        ({"dataset_name": "{inputs}/pears.jsonl"}, ["pears.jsonl"]),
        ({"dataset_name": "nobody/no-such-data"}, ["nobody/no-such-data"]),
        ({"max_length": 64, "max_prompt_length": 64}, ["--max_prompt_length must be less than --max_length"]),
        ({"attention": "tre"}, ["--attention tre", "tiles", "padded"]),
        ({"resume_from_checkpoint": "{inputs}/checkpoint-9"}, ["there is no such folder"]),
        ({"loss_type": "sigmoi"}, ["--loss_type must be one of", "Did you mean sigmoid?"]),
    ],
    ids=[
        "missing model folder",
        "empty model folder",
        "model is a file",
        "hub id offline",
        "LoRA target",
        "missing data file",
        "hub data offline",
        "no room for answers",
        "attention",
        "nothing to resume",
        "loss",
    ],
)
def test_refusals(
    inputs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flags: dict[str, object],
    words: list[str],
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    (tmp_path / "empty").mkdir()
    filled = {name: str(value).format(inputs=inputs, tmp=tmp_path) for name, value in flags.items()}
    assert main_train(command(inputs, tmp_path / "O", **filled)) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("error: ")
    assert error.count("error:") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "O").exists()  # nothing was written
