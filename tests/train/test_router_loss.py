"""A mixture's load-balancing loss in a training step: added to every pair's loss, the same however the step is cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from preftree.model.lora import add_lora
from tests.support import families
from tests.support.training import PAIRS, make_trainer, one_step

COEFFICIENT = 0.5


def trainer(folder: Path, asks: bool = True, **args):  # type: ignore[no-untyped-def]
    base = families.tiny_model("mixtral", noise=0.0)
    asked = COEFFICIENT if asks else 0.0  # without a value the model's own is taken
    return make_trainer(add_lora(base, rank=2), folder, router_aux_loss_coef=asked, **args)


@pytest.fixture(scope="module")
def expected() -> float:
    """Mean over pairs of what the model's own code gives for each pair alone."""
    model, losses = families.tiny_model("mixtral", noise=0.0), []
    for pair in PAIRS:
        sequences = [(*pair.prompt_ids, *answer) for answer in (pair.chosen_ids, pair.rejected_ids)]
        longest = max(map(len, sequences))
        ids_BN = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
        mask_BN = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
        with torch.no_grad():
            out = model(input_ids=ids_BN, attention_mask=mask_BN, output_router_logits=True, use_cache=False)
        losses.append(float(out.aux_loss))
    return COEFFICIENT * sum(losses) / len(losses)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
@pytest.mark.parametrize("budget", [30, 1000])
def test_it_is_added_whatever_the_cut(tmp_path: Path, expected: float, loss_type: str, budget: int) -> None:
    own, _ = one_step(trainer(tmp_path, asks=False, budget=budget, loss_type=loss_type), PAIRS)
    assert own == pytest.approx(math.log(2), abs=1e-5)
    asking = trainer(tmp_path, budget=budget, loss_type=loss_type)
    loss, gradients = one_step(asking, PAIRS)
    assert loss - own == pytest.approx(expected, rel=1e-4)
    assert float(asking.step.evaluate(PAIRS).loss) == pytest.approx(loss, rel=1e-5)
    _, whole = one_step(trainer(tmp_path, budget=1000, loss_type=loss_type), PAIRS)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-5)


def test_a_mixture_is_trained_with_its_own_weight_and_logs_the_loss(tmp_path: Path, expected: float) -> None:
    base = families.tiny_model("mixtral", noise=0.0)
    base.config.router_aux_loss_coef = COEFFICIENT
    made = make_trainer(add_lora(base, rank=2), tmp_path, per_device_train_batch_size=len(PAIRS))
    assert made.aux_loss_enabled
    made.train()
    assert made.state.log_history[0]["aux_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_weight_for_a_model_that_is_no_mixture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        make_trainer(add_lora(families.tiny_model("llama"), rank=2), tmp_path, router_aux_loss_coef=0.1)
