"""`--push_to_hub true`: asked before anything is loaded, uploaded once, at the end, with everything that is meant."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from transformers import Trainer

from preftree.cli import main_train
from preftree.errors import RunError, SettingsError
from preftree.publish import hub
from tests.support.command import command, write_inputs
from tests.support.training import make_model, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


def test_one_upload_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_inputs(tmp_path, pairs=6)
    output, sent = tmp_path / "run1", []

    def upload(self: object, repo_id: str, folder_path: Path, **options: object) -> SimpleNamespace:
        sent.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        return SimpleNamespace(commit_url="https://hub/me/run1")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, *words, **options: pytest.fail("Trainer uploads as well"))
    flags = command(inputs, output, push_to_hub="true", max_steps=1, save_strategy="no")
    assert main_train(flags) == 0
    ((repository, names),) = sent
    assert repository == "me/run1"
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "run"} <= set(names)


def test_offline_a_script_is_told_at_once(tmp_path: Path) -> None:
    """By the configuration that asks for it, or by the method."""
    with pytest.raises(SettingsError, match="--push_to_hub cannot work while HF_HUB_OFFLINE is set"):
        make_trainer(make_model(), tmp_path / "run1", push_to_hub=True)
    trainer = make_trainer(make_model(), tmp_path / "run2", hub_model_id="me/mine")
    with pytest.raises(RunError, match="`push_to_hub` me/mine: HF_HUB_OFFLINE is set"):
        trainer.push_to_hub()
