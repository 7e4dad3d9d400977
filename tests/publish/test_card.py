"""The model card: the hub's metadata, and what the run folder says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError

from preftree.errors import RunError
from preftree.io.run_folder import RunFolder
from preftree.publish import hub
from preftree.publish.card import run_card, wilson


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "run1")
    settings = {
        "model": {"model_name_or_path": "smollm2"},
        "data": {"dataset_name": "Intel/orca_dpo_pairs", "max_length": 512},
        "train": {"loss_type": ["sigmoid"], "beta": 0.1, "max_steps": -1, "learning_rate": 1e-5},
    }
    folder.claim(resume=False, overwrite=False, fingerprint="x", config=settings)
    (folder.output_dir / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/model"}))
    (folder.output_dir / "adapter_model.safetensors").write_text("")
    folder.write_data(
        {
            "source": "Intel/orca_dpo_pairs",
            "format": "Orca pairs",
            "rows": 103,
            "skipped": {"a tie": 3},
            "findings": ["check      chosen answers are longer (61 %)"],
            "training_pairs": 98,
            "validation_pairs": 2,
            "validation_from": "2 % of the pairs",
            "fingerprint": "abc123",
        }
    )
    folder.log({"step": 4, "eval_loss": 0.5, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.25})
    folder.finish(4)
    return folder.output_dir


def test_what_a_card_says(run: Path) -> None:
    card = run_card(run)
    data = card.data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert data.datasets == ["Intel/orca_dpo_pairs"]
    assert data.library_name == "peft"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "accuracy": 0.5,
        "margin": 0.25,
        "loss": 0.5,
    }
    for piece in (
        "98 pairs to train on, 2 held out",
        "`abc123`",
        "3 rows left out: a tie",
        "check: chosen answers are longer (61 %)",
        "| beta | 0.1 |",
        "| steps | 4 |",
        "50.0 % (95 % interval 9.5 to 90.5, 2 pairs)",
        "## Limits",
    ):
        assert piece in card.content, piece
    card.save(run / "README.md")
    assert ModelCard.load(str(run / "README.md")).data.to_dict() == data.to_dict()


@pytest.mark.parametrize(
    ("share", "count", "low", "high"), [(0.5, 10, 0.2366, 0.7634), (0.0, 5, 0.0, 0.4345), (1.0, 5, 0.5655, 1.0)]
)
def test_the_interval(share: float, count: int, low: float, high: float) -> None:
    """Published values of Wilson's interval."""
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-4)


class _Response:
    status_code = 403
    headers: dict[str, str] = {}
    request = None


def test_why_a_repository_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, repository: str, **options: object) -> None:
        raise HfHubHTTPError("403 Forbidden", response=_Response())  # type: ignore[arg-type]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set"):
        hub.check_writable("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(RunError, match="has no address here"):
        hub.check_writable("me/mine")
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    with pytest.raises(RunError, match="--push_to_hub true me/mine: the token may not write there"):
        hub.check_writable("me/mine", flag="--push_to_hub true")


def test_an_upload_leaves_checkpoints_and_votes_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, object]]] = []

    def create(self: object, repository: str, **options: object) -> SimpleNamespace:
        calls.append((repository, options))
        return SimpleNamespace(repo_id=f"me/{repository}")

    def upload_folder(self: object, **options: object) -> SimpleNamespace:
        calls.append(("upload", options))
        return SimpleNamespace(commit_url="https://hub/me/run1/commit/1")

    monkeypatch.setattr(hub.HfApi, "create_repo", create)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    assert hub.upload("run1", tmp_path, private=False) == "https://hub/me/run1/commit/1"
    (name, made), (_, sent) = calls
    assert (name, made) == ("run1", {"private": False, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("me/run1", tmp_path)  # the full name, as the hub gave it
    assert {"checkpoint-*/**", "run/votes.jsonl", ".*"} == set(sent["ignore_patterns"])  # type: ignore[call-overload]

    def fail(self: object, **options: object) -> None:
        raise OSError("the connection was lost")

    monkeypatch.setattr(hub.HfApi, "upload_folder", fail)
    with pytest.raises(RunError, match=r"is complete, and could not be uploaded to run1: the connection was lost"):
        hub.upload("run1", tmp_path)
