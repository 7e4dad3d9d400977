"""The findings: each a pure function of the evidence, with its threshold and the reason for it.

To add one, write a function and add it to `FINDINGS`. A finding that is not there yet returns None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

from preftree.health.evidence import Evidence

#: Standard errors that an accuracy must be above 0.5 to count as learned: 1 run in 160 passes by chance.
ERRORS_ABOVE_CHANCE = 2.5
#: Fewer pairs than this say nothing about an accuracy: its standard error is above 0.08.
FEWEST_PAIRS = 40
#: An accuracy above this is learned, whatever the number of pairs.
LEARNED = 0.65
#: Rewards closer to 0 than this: β log π/r of 0.02 at β 0.1 is a fifth of a nat for a whole answer.
UNMOVED = 0.02
#: Log lines before which rewards near 0 are no finding.
FEWEST_RECORDS = 8
#: A loss this many times the first one: worse than not training by more than noise of a window.
LOSS_JUMP = 1.5
#: Implicit margins beyond it: σ(15) differs from 1 by 3e-7, so that the sigmoid has no gradient left.
EXTREME_MARGIN = 15.0
#: Nats per token by which chosen answers may become less probable; at 1 every token is a third as probable.
COLLAPSE = 1.0
#: Nats per token at which displacement is worth a warning: each chosen token is a tenth less probable.
DISPLACED = 0.1
#: Nats for a whole answer, so that short answers are not judged by noise.
DISPLACED_NATS = 3.0
#: Accuracy and loss (as a share of the first) at which a window holds nothing left to learn.
SATURATED_ACCURACY, SATURATED_LOSS = 0.99, 0.02
#: Share of all windows that must be so.
SATURATED_SHARE = 0.5
#: The held-out loss over its minimum, and training accuracy minus held-out accuracy.
OVERFIT_LOSS, OVERFIT_GAP = 1.1, 0.15
#: Share of pairs whose chosen answer is the longer one (or the shorter), and the ratio of mean lengths.
LENGTH_SHARE, LENGTH_RATIO = 0.85, 1.5
#: Ratio of the tokens of an answer after and before training, its median over prompts, and the fewest prompts.
ANSWER_RATIO, FEWEST_PROMPTS = 1.5, 6
#: Nats per answer; policies trained with a KL penalty usually end below 20.
FAR_FROM_REFERENCE = 30.0
#: Share of chosen answers that end without their end token.
CUT_SHARE = 0.05


class Level(StrEnum):
    """How much a finding matters."""

    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Diagnosis:
    """One finding.

    Args:
        key: its name, the same in every version.
        title: in one plain sentence.
        number: what was measured.
        meaning: what it does to the model.
        remedy: what usually helps.
    """

    key: str
    level: Level
    title: str
    number: str
    meaning: str
    remedy: str


def margin_exploding(evidence: Evidence) -> Diagnosis | None:
    """Loss far above its start, extreme margins, or chosen answers that have become nearly impossible."""
    losses = evidence.values("loss")
    bad = [value for value in losses if not math.isfinite(value)]
    recent = losses[-2:]
    worst = fmean(recent) if recent and not bad else math.nan
    jumped = len(losses) >= 3 and losses[0] > 0 and worst > LOSS_JUMP * losses[0]
    margins = evidence.values("rewards/margins")
    margin = fmean(margins[-2:]) if margins else math.nan
    tokens = evidence.lengths.mean_chosen if evidence.lengths else math.nan
    fallen = -evidence.late("rewards/chosen") / evidence.beta / tokens if evidence.reference else math.nan
    numbers = []
    if bad:
        numbers.append("the loss is not finite")
    if jumped:
        numbers.append(f"loss {worst:.2f} after {losses[0]:.2f} at the start")
    if abs(margin) > EXTREME_MARGIN:
        numbers.append(f"mean margin {margin:+.1f}")
    if fallen > COLLAPSE:
        numbers.append(f"chosen answers lost {fallen:.1f} nats per token")
    if not numbers:
        return None
    return Diagnosis(
        "margin_exploding",
        Level.WARNING,
        "The margin explodes: the learning rate is too high.",
        ", ".join(numbers),
        "Updates are so large that the policy leaves the region in which it writes text; rewards are large for both "
        "answers and say little about preference.",
        "Lower the learning rate ten-fold, add warmup steps, or raise beta.",
    )


def not_learning(evidence: Evidence) -> Diagnosis | None:
    """Both rewards still at 0 late in the run, though what there is goes in the right direction."""
    if evidence.progress < 0.5 or len(evidence.records) < FEWEST_RECORDS:  # a short run is still in its warmup
        return None
    if not _unmoved(evidence) or accuracy_stuck(evidence) is not None:
        return None
    rewards = [evidence.late(f"rewards/{side}") for side in ("chosen", "rejected")]
    return Diagnosis(
        "not_learning",
        Level.WARNING,
        "Nothing was learned: the policy has hardly moved.",
        f"rewards {rewards[0]:+.4f} and {rewards[1]:+.4f}, accuracy {evidence.late('rewards/accuracies'):.2f}",
        "Both answers are as probable as under the reference.",
        "Raise the learning rate (LoRA: 1e-5 to 1e-4), or train for more steps.",
    )


def accuracy_stuck(evidence: Evidence) -> Diagnosis | None:
    """Accuracy on unseen pairs that cannot be told from chance.

    However little the policy moved, it moved towards the chosen answers if there is a rule that they follow.
    """
    if evidence.progress < 0.5:
        return None
    accuracy, count, where = evidence.last_evaluation("eval_rewards/accuracies"), evidence.evaluated_pairs, "held-out"
    if math.isnan(accuracy) or count < FEWEST_PAIRS:
        (accuracy, count), where = evidence.first_pass(), "not yet trained on"
    if math.isnan(accuracy) or count < FEWEST_PAIRS:
        return None
    error = 0.5 / math.sqrt(count)
    if accuracy > min(0.5 + ERRORS_ABOVE_CHANCE * error, LEARNED):
        return None
    return Diagnosis(
        "accuracy_stuck",
        Level.WARNING,
        "Accuracy is stuck near 0.5: the labels look random, or swapped in about half of the rows.",
        f"accuracy {accuracy:.2f} ± {error:.2f} on {count} pairs ({where})",
        "What is learned from some pairs does not hold for others: which answer is preferred follows no rule that the "
        "model can see. Random labels and rows with chosen and rejected swapped look the same.",
        "Read some pairs: is the chosen answer the better one? Look at how chosen and rejected were assigned, and run "
        "preftree check for contradictions."
        + (" But first raise the learning rate: the policy has hardly moved." if _unmoved(evidence) else ""),
    )


def _unmoved(evidence: Evidence) -> bool:
    rewards = [evidence.late(f"rewards/{side}") for side in ("chosen", "rejected")]
    return evidence.reference and all(abs(value) < UNMOVED for value in rewards)


def displacement(evidence: Evidence) -> Diagnosis | None:
    """Chosen answers less probable than under the reference (arXiv 2410.08847)."""
    if not evidence.reference or margin_exploding(evidence) is not None:
        return None
    nats = -evidence.now("rewards/chosen") / evidence.beta
    tokens = evidence.lengths.mean_chosen if evidence.lengths else math.nan
    per_token = nats / tokens
    if not nats > DISPLACED_NATS or per_token < DISPLACED:  # without lengths the nats alone decide
        return None
    number = f"log p of chosen answers fell by {nats:.1f} nats"
    return Diagnosis(
        "displacement",
        Level.WARNING,
        "Chosen answers became less probable (likelihood displacement).",
        number + (f", {per_token:.2f} per token" if per_token == per_token else ""),
        "The margin grows because rejected answers fall faster, and their probability goes to answers that are in "
        "neither column.",
        "Lower the learning rate, raise beta, or add a term for the chosen answer: --loss_type dpop or rpo.",
    )


def saturated(evidence: Evidence) -> Diagnosis | None:
    """Most windows with nothing left to learn."""
    losses, accuracies = evidence.values("loss"), evidence.values("rewards/accuracies")
    if len(losses) < 4 or len(losses) != len(accuracies) or not losses[0] > 0:
        return None
    done = [
        accuracy >= SATURATED_ACCURACY and abs(loss) < SATURATED_LOSS * losses[0]
        for loss, accuracy in zip(losses, accuracies, strict=True)
    ]
    share = sum(done) / len(done)
    if share < SATURATED_SHARE:
        return None
    return Diagnosis(
        "saturated",
        Level.WARNING,
        "The margin is saturated: the pairs have taught all that they can.",
        f"{100 * share:.0f} % of the log lines have accuracy 1 and a loss near 0",
        "More steps only push the policy away from the reference.",
        "Stop earlier, or train on harder pairs: rejected answers by a stronger model.",
    )


def overfitting(evidence: Evidence) -> Diagnosis | None:
    """Held-out pairs get worse while training pairs get better."""
    held_out = [float(record["eval_loss"]) for record in evidence.evaluations if "eval_loss" in record]
    train, last = evidence.values("loss"), evidence.last_evaluation("eval_rewards/accuracies")
    if not held_out or len(train) < 2 or evidence.evaluated_pairs < FEWEST_PAIRS:
        return None
    accuracy = evidence.late("rewards/accuracies")
    rising = len(held_out) >= 3 and held_out[-1] > OVERFIT_LOSS * min(held_out) > 0 and train[-1] < held_out[-1]
    error = ERRORS_ABOVE_CHANCE * 0.5 / math.sqrt(evidence.evaluated_pairs)
    epoch = max((float(record.get("epoch") or 0.0) for record in evidence.records), default=0.0)
    apart = epoch > 1.0 and accuracy - last > max(OVERFIT_GAP, error)
    if not rising and not apart:
        return None
    return Diagnosis(
        "overfitting",
        Level.WARNING,
        "The run over-fits: training pairs improve while held-out pairs get worse.",
        f"held-out loss {min(held_out):.3f} at best, {held_out[-1]:.3f} at the end; accuracy {accuracy:.2f} in "
        f"training, {last:.2f} held out",
        "The policy learns the training pairs by heart.",
        "Train fewer epochs, take the checkpoint with the lowest held-out loss, lower the learning rate or the LoRA "
        "rank, or bring more pairs.",
    )


def length_bias(evidence: Evidence) -> Diagnosis | None:
    """Chosen answers told from rejected ones by their length alone."""
    lengths = evidence.lengths
    if lengths is None:
        return None
    unequal, with_longer = lengths.unequal
    if unequal < FEWEST_PAIRS:
        return None
    longer = with_longer / unequal
    ratio = lengths.mean_chosen / lengths.mean_rejected
    word = "longer" if longer >= LENGTH_SHARE and ratio >= LENGTH_RATIO else ""
    word = "shorter" if 1 - longer >= LENGTH_SHARE and 1 / ratio >= LENGTH_RATIO else word
    if not word:
        return None
    share = longer if word == "longer" else 1 - longer
    return Diagnosis(
        "length_bias",
        Level.WARNING,
        f"Length explains the preferences: chosen answers are {word}.",
        f"the chosen answer is {word} in {100 * share:.0f} % of the pairs; {lengths.mean_chosen:.0f} tokens against "
        f"{lengths.mean_rejected:.0f} on average",
        f"The model can learn to answer {word} and nothing else; accuracy says little.",
        "Balance the lengths (preftree check --fix), train with --loss_type rdpo or --ld_alpha 0.5, and look at the "
        "length-controlled accuracy.",
    )


def answers_changed_length(evidence: Evidence) -> Diagnosis | None:
    """Answers to the fixed prompts longer or shorter than before."""
    before, after = evidence.answers.before, evidence.answers.after
    ratios = [b / a for a, b in zip(before, after, strict=True) if a]
    if len(ratios) < FEWEST_PROMPTS:
        return None
    ratio = median(ratios)
    if 1 / ANSWER_RATIO < ratio < ANSWER_RATIO:
        return None
    word = "longer" if ratio > 1 else "shorter"
    return Diagnosis(
        "answers_longer" if ratio > 1 else "answers_shorter",
        Level.NOTE,
        f"Answers became {word}.",
        f"{fmean(after):.0f} tokens on average after {fmean(before):.0f} before, on {len(before)} prompts",
        f"Judges and benchmarks that like {word} answers will score the length, and not the content.",
        "If it is not wanted: compare the lengths of chosen and rejected answers, and train with --loss_type rdpo or "
        "--ld_alpha 0.5.",
    )


def far_from_reference(evidence: Evidence) -> Diagnosis | None:
    """KL(π‖r), estimated from answers drawn from the policy."""
    ratios = evidence.answers.log_ratios
    if len(ratios) < FEWEST_PROMPTS or not fmean(ratios) > FAR_FROM_REFERENCE:
        return None
    return Diagnosis(
        "far_from_reference",
        Level.WARNING,
        "The policy is far from the reference.",
        f"KL {fmean(ratios):.0f} nats per answer, from {len(ratios)} drawn answers",
        "Much of what the reference knew may be lost.",
        "Raise beta, lower the learning rate, or train fewer steps.",
    )


def chosen_cut(evidence: Evidence) -> Diagnosis | None:
    """Chosen answers cut at the maximum length."""
    lengths = evidence.lengths
    if lengths is None or not lengths.chosen_cut:
        return None
    share = lengths.chosen_cut / lengths.pairs
    return Diagnosis(
        "chosen_cut",
        Level.WARNING if share >= CUT_SHARE else Level.NOTE,
        "Chosen answers were cut, and the model does not see them end.",
        f"{lengths.chosen_cut} of {lengths.pairs} chosen answers ({100 * share:.1f} %)",
        "A cut answer has no end token; with many of them the model learns to go on and on.",
        "Raise --max_length, or drop such pairs.",
    )


#: Key -> the finding; answers_changed_length has two keys. The order is that of reports.
FINDINGS: dict[str, Callable[[Evidence], Diagnosis | None]] = {
    "margin_exploding": margin_exploding,
    "accuracy_stuck": accuracy_stuck,
    "not_learning": not_learning,
    "length_bias": length_bias,
    "displacement": displacement,
    "overfitting": overfitting,
    "saturated": saturated,
    "far_from_reference": far_from_reference,
    "answers_changed_length": answers_changed_length,
    "chosen_cut": chosen_cut,
}


def diagnose(evidence: Evidence) -> list[Diagnosis]:
    """All findings, warnings first."""
    found = [finding for find in FINDINGS.values() if (finding := find(evidence)) is not None]
    return sorted(found, key=lambda finding: finding.level is not Level.WARNING)


def verdict(found: Sequence[Diagnosis]) -> str:
    """One sentence for people."""
    warnings = [each for each in found if each.level is Level.WARNING]
    if not warnings:
        more = "" if not found else f" {len(found)} {'thing' if len(found) == 1 else 'things'} worth knowing."
        return f"The run looks healthy: no warning.{more}"
    return f"{len(warnings)} {'warning' if len(warnings) == 1 else 'warnings'}: {' '.join(w.title for w in warnings)}"
