"""What a loss is a function of: the log-probs of pairs, and the constants of the objective.

Shape suffixes: P pairs or ranked lists, K answers of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSettings:
    """Constants of the losses, by the names that `DPOConfig` gives them."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 1.0
    cpo_alpha: float = 1.0
    dpop_lambda: float = 50.0
    rpo_alpha: float = 1.0
    rdpo_alpha: float = 0.01

    @classmethod
    def of(cls, config: Any) -> LossSettings:
        """Read off a `DPOConfig`."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Summed log-probs of the answers of P pairs, and their lengths in tokens; all of shape (P,) but for the tables.

    In a forest of fixed shape the first `real` of the pairs are real, and `weight_P` is 1 for them and 0 for the
    padding, whose log-probs are 0 and whose lengths are 1.

    Args:
        chosen_P, rejected_P: log π(y_w|x) and log π(y_l|x) of the policy, summed over tokens.
        ref_chosen_P, ref_rejected_P: the same of the reference; zeros where no loss needs one.
        chosen_length_P, rejected_length_P: tokens.
        mean_chosen_length: over all pairs of the step, for losses that average over its tokens; None for the mean of
            `chosen_length_P`.
        full_chosen_P, full_rejected_P: the policy's sums over all tokens, where those above weigh some less (LD-DPO);
            None where they are the same.
        router_P: what the routers of a mixture of experts add to each pair's loss; None for 0.
        importance_P: WPO's weight of each pair, a constant for the gradient; None for 1.
        policy_PK, reference_PK: log-probs of all answers of ranked lists, of which the chosen one is the best and the
            rejected one the worst; None where no loss asks for them.
        rank_PK: their ranks, 1 for the best; 0 where a list has fewer answers.
        tokens: sums over tokens for the metrics (`metrics.TOKEN_SUMS`); None where nobody asks.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor
    ref_rejected_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor
    weight_P: Tensor | None = None
    real: int | None = None
    mean_chosen_length: float | None = None
    importance_P: Tensor | None = None
    full_chosen_P: Tensor | None = None
    full_rejected_P: Tensor | None = None
    router_P: Tensor | None = None
    policy_PK: Tensor | None = None
    reference_PK: Tensor | None = None
    rank_PK: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def pairs(self) -> int:
        """Number of pairs, padding not counted."""
        return int(self.chosen_P.shape[0]) if self.real is None else self.real

    @property
    def chosen_ratio_P(self) -> Tensor:
        """log π(y_w|x) / r(y_w|x)"""
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        """log π(y_l|x) / r(y_l|x)"""
        return self.rejected_P - self.ref_rejected_P

    @property
    def chosen_mean_P(self) -> Tensor:
        """log π(y_w|x) / |y_w|"""
        return self.all_chosen_P / self.chosen_length_P

    @property
    def rejected_mean_P(self) -> Tensor:
        """log π(y_l|x) / |y_l|"""
        return (self.rejected_P if self.full_rejected_P is None else self.full_rejected_P) / self.rejected_length_P

    @property
    def all_chosen_P(self) -> Tensor:
        """log π(y_w|x), all of its tokens with the same weight."""
        return self.chosen_P if self.full_chosen_P is None else self.full_chosen_P


def join(parts: list[PairLogps]) -> PairLogps:
    """The pairs of several forests one after another, without padding."""
    columns: dict[str, Any] = {}
    for each in fields(PairLogps):
        values = [getattr(part, each.name) for part in parts]
        if isinstance(values[0], Tensor) and each.name not in ("weight_P", "tokens"):
            columns[each.name] = torch.cat([value[: part.pairs] for value, part in zip(values, parts, strict=True)])
    return PairLogps(**columns, mean_chosen_length=parts[0].mean_chosen_length)
