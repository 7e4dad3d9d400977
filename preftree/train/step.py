"""The losses of one forest of pairs: policy, reference, loss, in the order of the pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from preftree.forest import Forest, upload
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
        """One loss a pair, (P,); 0 for filling."""
        losses_P = LOSSES[self.loss_type](logps, self.beta, self.label_smoothing)
        return losses_P if logps.weight_P is None else losses_P * logps.weight_P


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
    forest, device = policy.forest, policy.token_S.device
    filling = forest.slots - len(forest.leaf_ids)
    # Sorted on the host, where the names are: nothing waits for the device, and no shape depends on the data.
    order = sorted(range(len(forest.leaf_ids)), key=forest.leaf_ids.__getitem__)
    lengths = [forest.leaf_lengths[leaf] for leaf in order] + [1] * filling
    order += range(len(order), forest.slots)
    order_L, length_L = upload([*order, *lengths], device).split(forest.slots)
    policy_L = policy.sum_L.index_select(0, order_L)
    reference_L = forest.sum_by_leaf(reference_S).index_select(0, order_L)
    real, weight_P = None, None
    if forest.shape is not None:
        real = len(forest.leaf_ids) // 2
        weight_P = upload([1.0] * real + [0.0] * (filling // 2), device)
    return PairLogps(
        chosen_P=policy_L[0::2],
        rejected_P=policy_L[1::2],
        ref_chosen_P=reference_L[0::2],
        ref_rejected_P=reference_L[1::2],
        chosen_length_P=length_L[0::2],
        rejected_length_P=length_L[1::2],
        weight_P=weight_P,
        real=real,
    )
