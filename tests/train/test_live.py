"""Which progress is shown: transformers' own in a notebook, one live line on a terminal, a bar or nothing elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import transformers.trainer
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from preftree import DPOConfig, DPOTrainer
from preftree.train import trainer as module
from preftree.train.live import LiveLine
from tests.support import tiny
from tests.support.against_trl import TEMPLATE, rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class NotebookProgress(TrainerCallback):
    """In the place of transformers' NotebookProgressCallback, which imports IPython."""


def shown(folder: Path, console: Console, **args: bool) -> set[type]:
    """The callbacks that show progress."""
    made = DPOTrainer(
        tiny.llama(num_hidden_layers=1),
        args=DPOConfig(
            # Else it follows transformers' logging level, which other tests have changed.
            **{"disable_tqdm": False, **args},
            output_dir=str(folder),
            max_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=rows(3, False),
        processing_class=tiny.word_tokenizer(TEMPLATE),
        console=console,
    )
    made.train()
    kinds = {type(callback) for callback in made.callback_handler.callbacks}
    return kinds & {NotebookProgress, LiveLine, ProgressCallback, PrinterCallback}


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200)


def test_a_terminal_gets_one_live_line(tmp_path: Path) -> None:
    console = terminal()
    assert shown(tmp_path, console) == {LiveLine}
    assert "step 1/1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_elsewhere_trainers_bar_or_lines(tmp_path: Path) -> None:
    assert shown(tmp_path, Console(file=io.StringIO())) == {ProgressCallback}
    assert shown(tmp_path, Console(file=io.StringIO()), disable_tqdm=True) == {LiveLine}
    assert shown(tmp_path, Console(quiet=True)) == {ProgressCallback}


def test_a_notebook_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (transformers.trainer, module):
        monkeypatch.setattr(where, "DEFAULT_PROGRESS_CALLBACK", NotebookProgress)
    assert shown(tmp_path, terminal()) == {NotebookProgress}
