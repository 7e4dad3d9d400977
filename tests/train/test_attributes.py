"""The attributes of TRL's trainer: read by scripts, set by callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from preftree import DPOTrainer
from tests.support.training import PAIRS, make_model, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


def margins(trainer: DPOTrainer) -> list[float]:
    trainer.train()
    return [record["rewards/margins"] for record in trainer.state.log_history if "loss" in record]


def test_a_callback_that_anneals_beta_changes_the_steps_that_follow(tmp_path: Path) -> None:
    class Annealing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            annealed.beta = 0.5

    constant, annealed = (make_trainer(make_model(), tmp_path / name, max_steps=2) for name in "ab")
    annealed.add_callback(Annealing())
    (first, second), (same, larger) = margins(constant), margins(annealed)
    assert same == first
    assert larger == pytest.approx(5 * second, rel=1e-9)  # of 0.1
    assert annealed.args.beta == annealed.beta == 0.5


def test_values_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, PAIRS)
    with pytest.raises(ValueError, match="--beta must be above 0"):
        trainer.beta = -1.0
    with pytest.raises(ValueError, match="--label_smoothing has no meaning for --loss_type ipo"):
        trainer.loss_types, trainer.label_smoothing = ["ipo"], 0.1
    with pytest.raises(ValueError, match=r"`loss_type` cannot become .*prepared for ipo\. Make a new trainer"):
        trainer.loss_types = ["simpo"]  # needs no reference
    assert (trainer.beta, trainer.loss_types, trainer.label_smoothing) == (0.1, ["ipo"], 0.0)
    assert trainer.step.objective.names == ("ipo",)


def test_what_scripts_read(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, ld_alpha=0.5)
    assert (trainer.ld_alpha, trainer.use_weighting, trainer.f_divergence_type) == (0.5, False, "reverse_kl")
    assert (trainer.loss_weights, trainer.f_alpha_divergence_coef, trainer.ref_model) == (None, 0.5, None)
    assert (trainer.precompute_ref_logps, trainer.aux_loss_enabled, trainer.router_aux_loss_coef) == (False, False, 0.0)
