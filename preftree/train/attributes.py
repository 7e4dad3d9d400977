"""The attributes of TRL's trainer that scripts and callbacks read or set, such as a callback that anneals beta."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from preftree.config.checks import refuse
from preftree.errors import SettingsError
from preftree.train.config import DPOConfig
from preftree.train.objective import Objective
from preftree.train.reference import Reference
from preftree.train.reference_models import SecondModel
from preftree.train.step import Step

#: Methods of TRL's trainers that scripts override, and Trainer's own that a step does not call.
_NOT_CALLED = (
    "compute_loss", "_compute_loss", "get_batch_loss_metrics", "concatenated_forward", "dpo_loss", "prediction_step",
    "compute_ref_log_probs", "_precompute_ref_logps", "_prepare_dataset",
)  # fmt: skip


class LossAttribute:
    """A field of the configuration's loss as an attribute of the trainer; setting it changes the steps that follow.

    Args:
        field: of `DPOConfig`.
    """

    def __init__(self, field: str) -> None:
        self.field = field

    def __get__(self, trainer: TrlSurface | None, owner: type | None = None) -> Any:
        return self if trainer is None else getattr(trainer.args, self.field)

    def __set__(self, trainer: TrlSurface, value: Any) -> None:
        """Raises SettingsError: a value that the configuration would refuse, or that changes what a step computes."""
        changed = copy.copy(trainer.args)
        setattr(changed, self.field, value)
        refuse(changed.problems())
        before, objective = trainer.step.objective, Objective.of(changed)
        if (objective.lists, objective.needs_reference) != (before.lists, before.needs_reference):
            raise SettingsError(
                f"`{self.field}` cannot become {value!r}: the data and the reference were prepared for "
                f"{' + '.join(before.names)}. Make a new trainer with that loss."
            )
        trainer.args, trainer.step.objective = changed, objective


class TrlSurface:
    """Attributes by their names in TRL, and which of its methods cannot be overridden."""

    args: DPOConfig
    step: Step
    reference: Reference | None

    beta = LossAttribute("beta")
    loss_types = LossAttribute("loss_type")
    loss_weights = LossAttribute("loss_weights")
    label_smoothing = LossAttribute("label_smoothing")
    ld_alpha = LossAttribute("ld_alpha")
    f_divergence_type = LossAttribute("f_divergence_type")
    f_alpha_divergence_coef = LossAttribute("f_alpha_divergence_coef")
    use_weighting = LossAttribute("use_weighting")

    def __init_subclass__(cls, **others: Any) -> None:
        """Refuse overrides of methods that TRL's trainers call and this one does not."""
        super().__init_subclass__(**others)
        if overridden := [name for name in _NOT_CALLED if name in cls.__dict__]:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(overridden)}, which is never called: a step is computed forest "
                "by forest. A loss of your own is a function of log-probs and one line in "
                "preftree.train.losses.LOSSES. Rows of token ids hold `prompt_ids`, `chosen_ids` and `rejected_ids`."
            )

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model, where it is a model of its own."""
        model = self.reference.model if self.reference is not None else None
        return model.scorer.model if isinstance(model, SecondModel) else None

    @property
    def precompute_ref_logps(self) -> bool:
        """Were the reference's log-probs asked for before the first step?"""
        return self.args.precompute_ref_log_probs

    @property
    def aux_loss_enabled(self) -> bool:
        """Is the routers' load-balancing loss of a mixture of experts trained on?"""
        return self.step.router is not None

    @property
    def router_aux_loss_coef(self) -> float:
        """Its weight; 0 where there is none."""
        return self.step.router.coefficient if self.step.router is not None else 0.0
