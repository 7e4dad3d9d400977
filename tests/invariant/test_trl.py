"""Step by step beside TRL's DPOTrainer, of which only the import differs: same losses, same metrics, same weights.

A few cases of all losses; `scripts/compare_with_trl.py` runs every one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import preftree
from tests.support.against_trl import STEPS, Case, run

trl = pytest.importorskip("trl", reason="TRL is not installed (the test extra has it)")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

#: Logged by both, with what they may differ by.
METRICS = {
    "loss": 1e-4, "learning_rate": 0.0, "grad_norm": 1e-3, "num_tokens": 0.0,
    "rewards/chosen": 1e-4, "rewards/rejected": 1e-4, "rewards/margins": 1e-4, "rewards/accuracies": 1e-6,
    "logps/chosen": 1e-3, "logps/rejected": 1e-3,
    "entropy": 1e-4, "logits/chosen": 1e-4, "logits/rejected": 1e-4, "mean_token_accuracy": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        Case("sigmoid", more={"tokens": 60}),
        Case("ipo", lora=False, conversational=True),
        Case("aot", lora=False),
        Case("ipo", more={"use_weighting": True}),
        Case("sigmoid+bco_pair+sft", conversational=True, more={"loss_weights": [0.8, 0.2, 1.0], "ld_alpha": 0.5}),
        Case("sigmoid", lora=False, more={"f_divergence_type": "js_divergence", "sync_ref_model": True}),
    ],
    ids=str,
)
def test_the_same_losses_step_by_step(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))
    ours = dict(case.more)
    small = {"tokens_per_forest": ours.pop("tokens", 1000)}  # several forests a step, or one
    case = Case(case.loss, case.lora, case.conversational, ours)
    found = run(preftree, Case(case.loss, case.lora, case.conversational, ours | small), tmp_path / "ours")
    expected = run(trl, case, tmp_path / "trl")
    assert len(found.history) == len(expected.history) == STEPS
    scale = max(1.0, expected.history[0]["loss"])
    for step, (have, want) in enumerate(zip(found.history, expected.history, strict=True)):
        for name, tolerance in METRICS.items():
            assert have[name] == pytest.approx(want[name], abs=tolerance * scale), f"step {step}: {name}"
    # It is training that is compared: the losses move.
    losses = [record["loss"] for record in found.history]
    assert max(losses) - min(losses) > 0.05
    assert found.weights.keys() == {name for name in expected.weights if ".ref." not in name}
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=0, atol=1e-4)
