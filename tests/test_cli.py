"""One message and exit code 2 for what a user can fix; light imports until a stage runs."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import preftree
from preftree.cli import app, main_train
from preftree.config.train import Settings
from preftree.errors import DataError

BASE = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O", "--use_cpu"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of every call of a stand-in for the trainer."""
    calls: list[Settings] = []
    stand_in = types.ModuleType("preftree.train.run")
    stand_in.train = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "preftree.train.run", stand_in)
    for name in ("PT_HPU_LAZY_MODE", "RANK"):  # set by the run itself: undone afterwards
        monkeypatch.setenv(name, "0")
    return calls


def test_training_gets_the_settings(trained: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_train([*BASE, "--logging_dir", "x"]) == 0
    assert trained[0].train.output_dir == "O"
    assert capsys.readouterr().out.count("note: --logging_dir") == 1


def test_only_the_first_rank_prints_notes(
    trained: list[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main_train([*BASE, "--logging_dir", "x"]) == 0
    assert capsys.readouterr().out == ""


def test_preftree_train_is_the_same_command(trained: list[Settings]) -> None:
    result = CliRunner().invoke(app, ["train", *BASE, "--lora_all_linear", "false", "--lora_target_modules", "q", "v"])
    assert result.exit_code == 0, result.output
    assert trained[0].lora.lora_target_modules == ["q", "v"]


def test_what_a_user_can_fix_is_one_message(trained: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_train([*BASE, "--lora_rnk", "3"]) == 2
    assert capsys.readouterr().err == (
        "error: --lora_rnk is not a setting of preftree train. Did you mean --lora_rank, --lora_r, --local_rank?\n"
    )
    assert trained == []


@pytest.mark.parametrize(("error", "code"), [(DataError("row 3: empty"), 2), (KeyboardInterrupt(), 130)])
def test_errors_of_the_stage(
    trained: list[Settings],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def fail(_: Settings) -> None:
        raise error

    monkeypatch.setattr(sys.modules["preftree.train.run"], "train", fail)
    assert main_train(BASE) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(trained: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["preftree.train.run"], "train", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main_train(BASE)


def test_help_lists_the_flags_in_groups() -> None:
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    assert result.output.count("\n") < 60
    for piece in ("--beta", "--model_name_or_path", "Examples:"):
        assert piece in result.output
    everything = CliRunner().invoke(app, ["train", "--help-all"]).output
    for piece in ("lora:", "transformers:", "--adam_beta1"):
        assert piece in everything


def test_version_and_env() -> None:
    assert CliRunner().invoke(app, ["version"]).output.strip() == preftree.__version__
    assert '"cpu"' in CliRunner().invoke(app, ["env"]).output


def test_the_script_without_a_gaudi_stack(repo_root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(repo_root / "dpo_clm.py"),
        *BASE[:4],
        "--use_habana",
        "--output_dir",
        str(tmp_path / "O"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --use_habana")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "O").exists()


def test_start_up_is_light(repo_root: Path) -> None:
    code = "import sys, preftree.cli; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo_root, timeout=60)
    assert result.stdout.strip() == "set()", result.stderr
