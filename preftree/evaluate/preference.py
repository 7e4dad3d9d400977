"""What a model thinks of held-out pairs: which answer is the more probable, by how much, and what training moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from rich.table import Table
from torch import Tensor

from preftree.forest import Pair, forests_of_pairs
from preftree.model.score import Scorer, evaluating, leaf_logprobs


@dataclass(frozen=True, eq=False)
class PairScores:
    """log p(answer | prompt) of P pairs under one model, in the order of the pairs; all of shape (P,)."""

    chosen_P: Tensor
    rejected_P: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer is the more probable one."""
        return float((self.chosen_P > self.rejected_P).double().mean())

    @property
    def margin(self) -> float:
        """Mean of log p(chosen) − log p(rejected), in nats."""
        return float((self.chosen_P - self.rejected_P).mean())


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[Pair],
    budget: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Score `pairs` in forests of at most `budget` tokens.

    Args:
        scorer: of the model; its training mode is restored.
        progress: called with (pairs done, pairs in all) after each forest.
    """
    device = scorer.causal.device
    sums: dict[int, Tensor] = {}
    with evaluating(scorer.model):
        for forest in forests_of_pairs(pairs, budget, device):
            scores = leaf_logprobs(scorer, forest)
            sum_L = scores.sum_L.double().cpu()
            sums |= {name: sum_L[leaf] for name, leaf in zip(forest.leaf_ids, forest.leaf_of_id, strict=True)}
            if progress is not None:
                progress(len(sums) // 2, len(pairs))
    ordered_L = torch.stack([sums[leaf] for leaf in range(2 * len(pairs))])
    return PairScores(ordered_L[0::2], ordered_L[1::2])


@dataclass(frozen=True)
class PreferenceReport:
    """Held-out pairs under one model. Standard errors are over pairs; log-probs are sums over an answer, in nats.

    Args:
        accuracy: share of pairs whose chosen answer is the more probable one.
        margin: mean of log p(chosen) − log p(rejected).
        length_controlled_accuracy: mean of `accuracy_longer` and `accuracy_shorter`, pairs whose chosen answer has
            more, or fewer, tokens than the rejected one. A model that only prefers short (or long) answers has 0.5,
            whatever the lengths in the file. None if one of the two does not occur.
        per_token_accuracy: as `accuracy`, of log-probs divided by the answers' tokens.
        chosen_shift, rejected_shift: mean of log p under the adapter minus log p without it. A chosen shift below
            0 is displacement: training made the preferred answers less probable too (arXiv 2410.08847).
        reward_accuracy: share of pairs whose chosen shift is above its rejected shift, DPO's implicit reward
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


def report_pairs(
    scorer: Scorer, pairs: Sequence[Pair], progress: Callable[[int, int], None] | None = None
) -> PreferenceReport:
    """Score pairs under a model, and without its adapter if it has one."""
    lengths = [
        torch.tensor([len(ids) for ids in side])
        for side in zip(*((p.chosen_ids, p.rejected_ids) for p in pairs), strict=True)
    ]
    scores, without = score_pairs(scorer, pairs, progress=progress), None
    if isinstance(scorer.model, PeftModel):
        with scorer.model.disable_adapter():
            without = score_pairs(scorer, pairs, progress=progress)
    return preference_report(scores, lengths[0], lengths[1], without)


def preference_table(report: PreferenceReport) -> Table:
    """A report for a terminal."""
    table = Table(title=f"{report.pairs} held-out pairs", title_justify="left", show_header=False)

    def add(name: str, value: float | None, form: str, error: float | None = None) -> None:
        if value is not None:
            table.add_row(name, f"{value:{form}}" + (f" ± {error:{form.lstrip('+')}}" if error is not None else ""))

    add("chosen answer more probable", report.accuracy, ".1%", report.accuracy_stderr)
    add("the same, length-controlled", report.length_controlled_accuracy, ".1%")
    add(f"  chosen the longer one ({report.longer} pairs)", report.accuracy_longer, ".1%")
    add(f"  chosen the shorter one ({report.shorter} pairs)", report.accuracy_shorter, ".1%")
    add("chosen answer more probable per token", report.per_token_accuracy, ".1%")
    add("margin, log p(chosen) − log p(rejected)", report.margin, "+.2f", report.margin_stderr)
    add("log p(chosen), adapter minus base", report.chosen_shift, "+.2f", report.chosen_shift_stderr)
    add("log p(rejected), adapter minus base", report.rejected_shift, "+.2f")
    add("DPO's implicit reward ranks rightly", report.reward_accuracy, ".1%")
    return table
