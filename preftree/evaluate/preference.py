"""Log-probs of pairs of answers: which answer is the more probable one, by how much, and what training moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.errors import ModelError
from preftree.forest import Bundle, Forest, Pair, bundles_of_pairs, grow, pack
from preftree.model.memory import is_out_of_memory
from preftree.model.score import Scorer, evaluating, leaf_logprobs


@dataclass(frozen=True, eq=False)
class PairScores:
    """log p(answer | prompt) of P pairs under one model, in the order of the pairs; all of shape (P,)."""

    chosen_P: Tensor
    rejected_P: Tensor

    @property
    def accuracy(self) -> float:
        """Fraction of pairs whose chosen answer is the more probable one."""
        return float((self.chosen_P > self.rejected_P).double().mean())

    @property
    def margin(self) -> float:
        """Mean of log p(chosen) − log p(rejected), in nats."""
        return float((self.chosen_P - self.rejected_P).mean())


class AnswerTooLong(ModelError):
    """The memory does not suffice for one answer behind its prompt; `leaf` is 2i (chosen) or 2i + 1 of pair i."""

    def __init__(self, leaf: int, tokens: int) -> None:
        super().__init__(f"out of memory: one answer and its prompt, {tokens} tokens, do not fit")
        self.leaf, self.tokens = leaf, tokens


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[Pair],
    budget: int = 2048,
    progress: Callable[[int, int], None] | None = None,
    shrunk: Callable[[int], None] | None = None,
) -> PairScores:
    """Score `pairs` in forests of at most `budget` tokens; what runs out of memory is redone in smaller forests.

    Args:
        scorer: of the model; its training mode is restored.
        progress: called with (pairs done, pairs in all) after each forest.
        shrunk: called with the new budget after the memory did not suffice.

    Raises:
        AnswerTooLong: one answer behind its prompt does not fit into memory.
    """
    sums: dict[int, Tensor] = {}
    bundles = bundles_of_pairs(pairs)
    with evaluating(scorer.model):
        while bundles:
            groups = pack(bundles, budget)
            bundles = []
            for number, group in enumerate(groups):
                try:
                    sums |= _sums(scorer, group)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    bundles = [*_smaller(group), *(bundle for later in groups[number + 1 :] for bundle in later)]
                    tokens = sum(tree.size for tree in grow(group))
                    budget = max(1, min(budget, tokens // 2 if len(group) > 1 else tokens - 1))
                    if shrunk is not None:
                        shrunk(budget)
                    break
                if progress is not None:
                    progress(len(sums) // 2, len(pairs))
    ordered_L = torch.stack([sums[leaf] for leaf in range(2 * len(pairs))])
    return PairScores(ordered_L[0::2], ordered_L[1::2])


def _sums(scorer: Scorer, group: Sequence[Bundle]) -> dict[int, Tensor]:
    """log p of each answer of a forest, by its leaf's name."""
    forest = Forest.of(group, scorer.causal.device)
    sum_L = leaf_logprobs(scorer, forest).sum_L.double().cpu()
    return {name: sum_L[leaf] for name, leaf in zip(forest.leaf_ids, forest.leaf_of_id, strict=True)}


def _smaller(group: Sequence[Bundle]) -> list[Bundle]:
    """The same answers in smaller pieces: pairs by themselves, or the two answers of one pair.

    Raises:
        AnswerTooLong: there is nothing smaller.
    """
    if len(group) > 1:
        return list(group)
    (bundle,) = group
    if len(bundle.continuations) == 1:
        raise AnswerTooLong(bundle.leaf_ids[0], bundle.size)
    return [
        Bundle(bundle.prompt, (continuation,), (leaf,))
        for continuation, leaf in zip(bundle.continuations, bundle.leaf_ids, strict=True)
    ]


@dataclass(frozen=True)
class PreferenceReport:
    """Held-out pairs under one model. Standard errors are over pairs; log-probs are sums over an answer, in nats.

    Args:
        accuracy: fraction of pairs whose chosen answer is the more probable one.
        margin: mean of log p(chosen) − log p(rejected).
        length_controlled_accuracy: mean of `accuracy_longer` and `accuracy_shorter`, pairs whose chosen answer has
            more, or fewer, tokens than the rejected one. A model that only prefers short (or long) answers has 0.5,
            whatever the lengths in the file. None if one of the two does not occur.
        per_token_accuracy: as `accuracy`, of log-probs divided by the answers' tokens.
        chosen_shift, rejected_shift: mean of log p under the adapter minus log p without it. A chosen shift below
            0 is displacement: training made the preferred answers less probable too (arXiv 2410.08847).
        reward_accuracy: fraction of pairs whose chosen shift is above its rejected shift, DPO's implicit reward
            (arXiv 2305.18290, section 4) up to beta. None without an adapter, as are the shifts.
    """

    pairs: int
    accuracy: float
    accuracy_stderr: float
    margin: float
    margin_stderr: float
    length_controlled_accuracy: float | None
    accuracy_longer: float | None
    accuracy_shorter: float | None
    longer: int
    shorter: int
    per_token_accuracy: float
    chosen_shift: float | None = None
    chosen_shift_stderr: float | None = None
    rejected_shift: float | None = None
    reward_accuracy: float | None = None


def preference_report(
    scores: PairScores, chosen_tokens_P: Tensor, rejected_tokens_P: Tensor, without: PairScores | None = None
) -> PreferenceReport:
    """Sum up pairs' scores.

    Args:
        chosen_tokens_P, rejected_tokens_P: tokens of the answers.
        without: the same pairs scored without the adapter.
    """
    right_P = (scores.chosen_P > scores.rejected_P).double()
    margin_P = scores.chosen_P - scores.rejected_P
    longer_P, shorter_P = chosen_tokens_P > rejected_tokens_P, chosen_tokens_P < rejected_tokens_P
    by_length = [float(right_P[where].mean()) if where.any() else None for where in (longer_P, shorter_P)]
    known = [value for value in by_length if value is not None]
    per_token_P = scores.chosen_P / chosen_tokens_P > scores.rejected_P / rejected_tokens_P
    shifts: dict[str, float] = {}
    if without is not None:
        chosen_P, rejected_P = scores.chosen_P - without.chosen_P, scores.rejected_P - without.rejected_P
        shifts = {
            "chosen_shift": float(chosen_P.mean()),
            "chosen_shift_stderr": _stderr(chosen_P),
            "rejected_shift": float(rejected_P.mean()),
            "reward_accuracy": float((chosen_P > rejected_P).double().mean()),
        }
    return PreferenceReport(
        pairs=len(right_P),
        accuracy=float(right_P.mean()),
        accuracy_stderr=_stderr(right_P),
        margin=float(margin_P.mean()),
        margin_stderr=_stderr(margin_P),
        length_controlled_accuracy=sum(known) / 2 if len(known) == 2 else None,
        accuracy_longer=by_length[0],
        accuracy_shorter=by_length[1],
        longer=int(longer_P.sum()),
        shorter=int(shorter_P.sum()),
        per_token_accuracy=float(per_token_P.double().mean()),
        **shifts,
    )


def _stderr(value_P: Tensor) -> float:
    return float(value_P.std() / len(value_P) ** 0.5) if len(value_P) > 1 else float("nan")
