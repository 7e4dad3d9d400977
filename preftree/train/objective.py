"""What a step minimises: one loss or a weighted mixture, per pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from preftree.train.config import DPOConfig
from preftree.train.losses import LOSSES, LossSettings, PairLogps
from preftree.train.losses.listwise import is_worse, ranked


@dataclass(frozen=True)
class Objective:
    """Losses with their weights (MPO, arXiv 2411.10442, for several), and how log-probs become what they see.

    Args:
        loss_type: a name of `LOSSES`, or several.
        weights: one per loss; None for 1.
        settings: constants of the losses.
        ld_alpha: weight of an answer's tokens beyond the other one's length (LD-DPO, arXiv 2409.06411); None for 1.
        use_weighting: weigh pairs by the policy's own probability of them (WPO, arXiv 2406.11827, eq. 2).
    """

    loss_type: str | Sequence[str] = "sigmoid"
    weights: Sequence[float] | None = None
    settings: LossSettings = field(default_factory=LossSettings)
    ld_alpha: float | None = None
    use_weighting: bool = False

    @classmethod
    def of(cls, config: DPOConfig) -> Objective:
        """What a `DPOConfig` asks for."""
        return cls(
            tuple(config.loss_type),
            config.loss_weights,
            LossSettings.of(config),
            config.ld_alpha,
            config.use_weighting,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def needs_reference(self) -> bool:
        """Does any of the losses compare with a reference?"""
        return any(LOSSES[name].reference for name in self.names)

    @property
    def lists(self) -> bool:
        """Does any of the losses compare all answers of a ranked list?"""
        return any(LOSSES[name].lists for name in self.names)

    @property
    def coupled(self) -> bool:
        """Does any of the losses need all pairs of the step at once?"""
        return any(LOSSES[name].coupled for name in self.names)

    def losses(self, logps: PairLogps) -> Tensor:
        """One value per pair, (P,), whose mean is the loss; 0 for padding."""
        total_P: Tensor | None = None
        for name, weight in zip(self.names, self.weights or [1.0] * len(self.names), strict=True):
            term_P = weight * LOSSES[name].values(logps, self.settings)
            total_P = term_P if total_P is None else total_P + term_P
        assert total_P is not None
        if logps.importance_P is not None:
            total_P = total_P * logps.importance_P
        return total_P if logps.weight_P is None else total_P * logps.weight_P

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen and the rejected answers, (P,): β log π/r, without a reference β log π."""
        beta = self.settings.beta
        if set(self.names) == {"simpo"}:  # its reward is an average over tokens
            return beta * logps.chosen_mean_P, beta * logps.rejected_mean_P
        return beta * logps.chosen_ratio_P, beta * logps.rejected_ratio_P

    def in_order(self, logps: PairLogps) -> Tensor | None:
        """The share of each ranked list's pairs of answers whose rewards are in the order of their ranks.

        (P,), 0 for padding; None where no loss is of lists.
        """
        if logps.policy_PK is None:
            return None
        policy_PK, reference_PK, rank_PK = ranked(logps)
        reward_PK = (policy_PK - reference_PK).detach()
        worse_PKK = is_worse(rank_PK)
        right_PKK = worse_PKK & (reward_PK[:, :, None] > reward_PK[:, None, :])
        return right_PKK.sum((1, 2)) / worse_PKK.sum((1, 2)).clamp(min=1)
