"""The losses of one forest of pairs: policy, reference, loss, in the order of the pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from preftree.forest import Forest, upload
from preftree.model.score import LeafLogprobs, Scorer, leaf_logprobs
from preftree.train.losses import LOSSES, PairLogps
from preftree.train.reference import Reference


@dataclass(frozen=True)
class Objective:
    """Which loss, with what constants."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def losses(self, logps: PairLogps) -> Tensor:
        """One loss per pair, (P,); 0 for padding."""
        losses_P = LOSSES[self.loss_type](logps, self.beta, self.label_smoothing)
        return losses_P if logps.weight_P is None else losses_P * logps.weight_P


def forest_losses(
    scorer: Scorer, forest: Forest, reference: Reference, objective: Objective
) -> tuple[Tensor, PairLogps]:
    """Losses (P,) and log-probs of the pairs of a forest from `forests_of_pairs`, differentiable.

    The reference has been filled in for this forest (`Reference.fill`): a step does that for all its forests
    before the first of them keeps activations for its backward pass.
    """
    logps = pair_logps(leaf_logprobs(scorer, forest), reference.known(forest))
    return objective.losses(logps), logps


def pair_logps(policy: LeafLogprobs, reference_S: Tensor) -> PairLogps:
    """Chosen and rejected side by side, pairs in the order of their number.

    Args:
        policy: scores of a forest from `forests_of_pairs`.
        reference_S: the reference's log-probs of the same tokens.
    """
    forest, device = policy.forest, policy.token_S.device
    names = len(forest.leaf_ids)
    padding = forest.shape.leaves - names if forest.shape is not None else 0
    # Sorted on the host, where the names are: nothing waits for the device, and no shape depends on the data.
    # An answer in several pairs is one leaf, which stands here as often; padding comes from leaves that nothing is in.
    order = [forest.leaf_of_id[i] for i in sorted(range(names), key=forest.leaf_ids.__getitem__)]
    lengths = [forest.leaf_lengths[leaf] for leaf in order] + [1] * padding
    order += range(names, names + padding)
    order_N, length_N = upload([*order, *lengths], device).split(len(order))
    policy_N = policy.sum_L.index_select(0, order_N)
    reference_N = forest.sum_by_leaf(reference_S).index_select(0, order_N)
    real, weight_P = None, None
    if forest.shape is not None:
        real = names // 2
        weight_P = upload([1.0] * real + [0.0] * (padding // 2), device)
    return PairLogps(
        chosen_P=policy_N[0::2],
        rejected_P=policy_N[1::2],
        ref_chosen_P=reference_N[0::2],
        ref_rejected_P=reference_N[1::2],
        chosen_length_P=length_N[0::2],
        rejected_length_P=length_N[1::2],
        weight_P=weight_P,
        real=real,
    )
