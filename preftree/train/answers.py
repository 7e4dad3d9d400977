"""The answers of a forest's pairs side by side: their log-probs, and what metrics and weights sum over their tokens.

Shape suffixes: S scored tokens, N answers (chosen and rejected in turn), P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.forest import Forest, upload
from preftree.model.logprob import TokenStats
from preftree.model.score import LeafLogprobs
from preftree.train.losses import PairLogps
from preftree.train.ranked import RankedNames, RankedTable


@dataclass(frozen=True, eq=False)
class AnswerOrder:
    """The answers of a forest's pairs, chosen and rejected side by side, pairs in the order of their number.

    An answer in several pairs is one leaf, which stands here as often; padding comes from leaves that nothing is in.

    Args:
        leaves: the leaf of each answer.
        leaf_N, length_N: the same on the device, and each answer's tokens.
        pairs: number of pairs without padding.
        lists: the leaves of each pair's answers, which are more than two in a ranked list.
        table: the same for losses of lists; None where there are none.
    """

    forest: Forest
    leaves: list[int]
    leaf_N: Tensor
    length_N: Tensor
    pairs: int
    lists: list[list[int]]
    table: RankedTable | None = None

    @classmethod
    def of(cls, forest: Forest, device: torch.device, ranked: RankedNames | None = None) -> AnswerOrder:
        """Sorted on the host, where the names are: nothing waits for the device, and no shape depends on the data.

        Args:
            ranked: what the answers of ranked lists are called; None for pairs alone.
        """
        leaf_of_name = dict(zip(forest.leaf_ids, forest.leaf_of_id, strict=True))
        names = sorted(name for name in leaf_of_name if ranked is None or name < ranked.pair_names)
        order = [leaf_of_name[name] for name in names]
        slots = len(names) // 2 if forest.shape is None else forest.shape.pairs
        padding = 2 * slots - len(names)
        lengths = [forest.leaf_lengths[leaf] for leaf in order] + [1] * padding
        order += range(len(leaf_of_name), len(leaf_of_name) + padding)
        leaf_N, length_N = upload([*order, *lengths], device).split(len(order))
        pairs, real = [name // 2 for name in names[0::2]], order[: len(names)]
        if ranked is None:
            lists = [list(leaves) for leaves in zip(real[0::2], real[1::2], strict=True)]
            return cls(forest, order, leaf_N, length_N, len(pairs), lists)
        lists = ranked.leaves(forest, pairs)
        return cls(forest, order, leaf_N, length_N, len(pairs), lists, ranked.table(forest, pairs, slots))

    def sums(self, value_S: Tensor) -> Tensor:
        """The sum of a value over each answer's tokens, (N,)."""
        return self.forest.sum_by_leaf(value_S).index_select(0, self.leaf_N)

    def importance(self, token_S: Tensor, stats: TokenStats) -> Tensor:
        """WPO's weights (arXiv 2406.11827, eq. 2), (P,): how likely the policy itself writes both answers, per token
        and against the likelihood of its own tokens."""
        aligned_N = (self.sums(token_S.detach() - stats.collision_S) / self.length_N).exp()
        return aligned_N[0::2] * aligned_N[1::2]

    def token_sums(self, stats: TokenStats) -> Tensor:
        """What `metrics.TOKEN_SUMS` names, of these answers."""
        entropy_N, logit_N, top1_N = (self.sums(each_S) for each_S in stats.values_KS[:3])
        real_N = (self.leaf_N < len(self.forest.leaf_lengths)).to(entropy_N.dtype)
        length_N = real_N * self.length_N
        columns = (
            entropy_N.sum(),
            length_N.sum(),
            logit_N[0::2].sum(),
            logit_N[1::2].sum(),
            top1_N[0::2].sum(),
            length_N[0::2].sum(),
        )
        return torch.stack(columns)


def pair_logps(
    policy: LeafLogprobs, reference_S: Tensor | None, answers: AnswerOrder, ld_alpha: float | None = None
) -> PairLogps:
    """Log-probs of a forest's pairs.

    Args:
        policy: scores of a forest from `forests_of_pairs`.
        reference_S: the reference's log-probs of the same tokens; None for zeros.
        ld_alpha: see `Objective`.
    """
    forest = policy.forest

    def weighed(sum_N: Tensor, value_S: Tensor) -> Tensor:
        if ld_alpha is None:
            return sum_N
        return ld_alpha * sum_N + (1 - ld_alpha) * _shared_sum(forest, value_S, answers.leaves)

    full_N = answers.sums(policy.token_S)
    policy_N = weighed(full_N, policy.token_S)
    reference_N = torch.zeros_like(policy_N).detach()
    if reference_S is not None:
        reference_N = weighed(answers.sums(reference_S), reference_S)
    table, policy_PK, reference_PK = answers.table, None, None
    if table is not None:
        policy_PK = table.values(forest.sum_by_leaf(policy.token_S))
        reference_PK = torch.zeros_like(policy_PK).detach()
        if reference_S is not None:
            reference_PK = table.values(forest.sum_by_leaf(reference_S))
    real, weight_P = None, None
    if forest.shape is not None:
        real = answers.pairs
        weight_P = upload([1.0] * real + [0.0] * (len(answers.leaves) // 2 - real), policy_N.device)
    return PairLogps(
        chosen_P=policy_N[0::2],
        rejected_P=policy_N[1::2],
        ref_chosen_P=reference_N[0::2],
        ref_rejected_P=reference_N[1::2],
        chosen_length_P=answers.length_N[0::2],
        rejected_length_P=answers.length_N[1::2],
        weight_P=weight_P,
        real=real,
        full_chosen_P=None if ld_alpha is None else full_N[0::2],
        full_rejected_P=None if ld_alpha is None else full_N[1::2],
        policy_PK=policy_PK,
        reference_PK=reference_PK,
        rank_PK=None if table is None else table.rank_PK,
    )


def _shared_sum(forest: Forest, value_S: Tensor, order: Sequence[int]) -> Tensor:
    """The sum over each answer's first tokens, as many as the shorter answer of its pair has, (answers,)."""
    starts, begin = [], 0
    for length in forest.leaf_lengths:
        starts.append(begin)
        begin += length
    rows: list[int] = []
    owners: list[int] = []
    for answer, leaf in enumerate(order):
        if leaf >= len(starts):  # padding
            continue
        shared = min(forest.leaf_lengths[order[answer - answer % 2 + side]] for side in (0, 1))
        rows += range(starts[leaf], starts[leaf] + shared)
        owners += [answer] * shared
    index, owner = upload([*rows, *owners], value_S.device).split(len(rows))
    return value_S.new_zeros(len(order)).index_add(0, owner, value_S.index_select(0, index))
