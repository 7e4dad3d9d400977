"""Code that comes with a model: run where the user says so, told first, and never otherwise."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preftree import DPOConfig, DPOTrainer
from preftree.cli import main_train
from preftree.train.store import scoring_key
from tests.support import tiny
from tests.support.against_trl import TEMPLATE, rows
from tests.support.command import command, losses, write_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def with_code(folder: Path) -> Path:
    """A model folder whose class comes with it."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def trainer(model: Path, out: Path, console: Console, **more: Any) -> DPOTrainer:
    settings = {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    args = DPOConfig(str(out), use_cpu=True, **settings, **more)
    return DPOTrainer(
        str(model),
        args=args,
        train_dataset=rows(6, False),
        processing_class=tiny.word_tokenizer(TEMPLATE),
        console=console,
    )


def test_a_script_that_trusts_it_trains(tmp_path: Path) -> None:
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    told = io.StringIO()
    made = trainer(with_code(tmp_path / "model"), tmp_path, Console(file=told, width=300), trust_remote_code=True)
    assert type(made.model).__name__ == "OwnForCausalLM"
    assert made.scorer.shares_prompts
    assert re.search(r"code +Python code that comes with folder .*model, if any, is run as you", told.getvalue())
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("trusted", [None, False])
def test_it_is_not_run_otherwise(tmp_path: Path, trusted: bool | None) -> None:
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    folder = with_code(tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{CODE}")
    more = {} if trusted is None else {"trust_remote_code": trusted}
    with pytest.raises(ValueError, match="custom code"):
        trainer(folder, tmp_path, Console(quiet=True), **more)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_told_of_a_model_without_code(tmp_path: Path) -> None:
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    told = io.StringIO()
    trainer(tmp_path / "model", tmp_path, Console(file=told), trust_remote_code=True)
    assert "code  " not in told.getvalue()


def test_another_version_of_the_code_finds_no_reference_of_the_old_one(tmp_path: Path) -> None:
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    folder, keys = with_code(tmp_path / "model"), set()
    for code in (CODE, CODE, f"{CODE}\n# another version"):
        (folder / "own.py").write_text(code)
        made = trainer(folder, tmp_path, Console(quiet=True), trust_remote_code=True)
        keys.add(scoring_key("the same weights", made.scorer))
    assert len(keys) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    with_code(inputs / "model")
    assert main_train(command(inputs, tmp_path / "A", max_steps=1)) == 2
    assert "--trust_remote_code true" in capsys.readouterr().err
    assert main_train(command(inputs, tmp_path / "B", max_steps=1, trust_remote_code="true")) == 0
    assert "is run as you" in capsys.readouterr().out
    assert losses(tmp_path / "B") == [pytest.approx(math.log(2), abs=1e-6)]
