"""The losses of one forest of pairs: policy, reference, loss, in the order of the pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from preftree.forest import Forest
from preftree.model.score import LeafLogprobs, leaf_logprobs
from preftree.train.losses import LOSSES, PairLogps
from preftree.train.reference import Reference


@dataclass(frozen=True)
class Objective:
    """Which loss, with what constants."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def losses(self, logps: PairLogps) -> Tensor:
        """One loss a pair, (P,)."""
        return LOSSES[self.loss_type](logps, self.beta, self.label_smoothing)


def forest_losses(
    model: nn.Module, forest: Forest, reference: Reference, objective: Objective
) -> tuple[Tensor, PairLogps]:
    """Losses (P,) and log-probs of the pairs of a forest from `forests_of_pairs`, differentiable.

    The reference has been filled in for this forest (`Reference.fill`): a step does that for all its forests
    before the first of them keeps activations for its backward pass.
    """
    logps = pair_logps(leaf_logprobs(model, forest), reference.known(forest))
    return objective.losses(logps), logps


def pair_logps(policy: LeafLogprobs, reference_S: Tensor) -> PairLogps:
    """Chosen and rejected side by side, pairs in the order of their number.

    Args:
        policy: scores of a forest from `forests_of_pairs`.
        reference_S: the reference's log-probs of the same tokens.
    """
    device = policy.token_S.device
    order_L = torch.tensor(policy.leaf_ids, device=device).argsort()
    length_L = torch.tensor(policy.lengths, device=device)[order_L]
    policy_L = policy.sum_L[order_L]
    reference_L = reference_S.new_zeros(len(policy.leaf_ids)).index_add(0, policy.leaf_S, reference_S)[order_L]
    return PairLogps(
        chosen_P=policy_L[0::2],
        rejected_P=policy_L[1::2],
        ref_chosen_P=reference_L[0::2],
        ref_rejected_P=reference_L[1::2],
        chosen_length_P=length_L[0::2],
        rejected_length_P=length_L[1::2],
    )
