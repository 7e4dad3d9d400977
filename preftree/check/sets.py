"""What can be seen only in all pairs together. To add a measure: a function of `Seen`, and a line in `SET_CHECKS`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from preftree.check.read import BROKEN, MISLABELLED, TIED, Seen
from preftree.check.report import FINE, NOTE, SPOILS, Finding, FixAction, Measure, Rows, make_finding
from preftree.check.rows import DAMAGE_CHECKS, ROW_CHECKS
from preftree.data.formats import NO_MARGIN, NO_OPPOSITE, NO_SCORES, PART_EARLY
from preftree.data.ranked import TOO_FEW

_LEFT_OUT = "training leaves such rows out"
MISSING: dict[str, tuple[str, Measure]] = {
    "broken_rows": (
        BROKEN,
        Measure("rows that cannot be read", "training refuses the whole file", spoils=1e-12, fix=FixAction.DROP),
    ),
    "score_ties": (TIED, Measure("score ties", _LEFT_OUT, spoils=0.5, fix=FixAction.DROP)),
    "mislabelled": (
        MISLABELLED,
        Measure(
            MISLABELLED, f"{_LEFT_OUT}; other trainers learn them the wrong way round", spoils=0.5, fix=FixAction.DROP
        ),
    ),
    "diverge_early": (
        PART_EARLY,
        Measure("conversations that diverge before the last answer", _LEFT_OUT, spoils=0.5, fix=FixAction.DROP),
    ),
    "too_few": (TOO_FEW, Measure(TOO_FEW, _LEFT_OUT, spoils=0.5, fix=FixAction.DROP)),
    "no_opposite": (NO_OPPOSITE, Measure("labelled answers without an opposite", _LEFT_OUT, spoils=0.9)),
    "no_margin": (NO_MARGIN, Measure("rows without a margin above min_margin", _LEFT_OUT, spoils=0.9)),
    "no_scores": (NO_SCORES, Measure(NO_SCORES, _LEFT_OUT, spoils=0.9)),
}
"""Rows that give no pair: name -> the reason under which they were noted, and what it means."""


def unreadable_files(seen: Seen) -> list[Finding]:
    """Files that cannot be read, or not to their end."""
    measure = Measure(
        "files that cannot be read", "training refuses the data as long as they are there; see why below", spoils=1e-12
    )
    files = seen.unreadable
    named = ", ".join(files[:5]) + (", …" if len(files) > 5 else "")
    return [make_finding("unreadable_files", measure, len(files), len(seen.files), unit="files", detail=named)]


def missing_rows(seen: Seen) -> list[Finding]:
    """Broken rows, ties, and what else gives no pair."""
    findings = []
    for key, (reason, measure) in MISSING.items():
        rows = seen.missing(reason)
        if len(rows) or key in ("broken_rows", "score_ties"):
            findings.append(make_finding(key, measure, len(rows), seen.rows, rows))
    return findings


def read_otherwise(seen: Seen) -> list[Finding]:
    """What was done to rows that are not read as they stand: dialogues split, messages parsed from text, …"""
    why = "training reads them like this, too"
    return [
        make_finding(
            f"read: {note}",
            Measure(f"rows read otherwise than they stand: {note}", why),
            len(rows),
            seen.rows,
            np.array(rows, np.int64),
        )
        for note, rows in seen.read_as.items()
    ]


def single_rows(seen: Seen) -> list[Finding]:
    """What `rows.py` saw in single rows."""
    measures = {name: measure for name, (_, measure) in (ROW_CHECKS | DAMAGE_CHECKS).items()}
    hits = {name: seen.hits(name) for name in measures}
    return [make_finding(name, measure, len(hits[name]), seen.rows, hits[name]) for name, measure in measures.items()]


def duplicate_pairs(seen: Seen) -> list[Finding]:
    """Pairs that were there before, with the same prompt and the same two answers."""
    later = _repeated(_joint(seen, "prompt", "chosen", "rejected"))
    measure = Measure("duplicate pairs", "they count twice in every epoch", spoils=0.2, fix=FixAction.DROP)
    return [_of_pairs("duplicate_pairs", measure, later, seen)]


def contradictory_pairs(seen: Seen) -> list[Finding]:
    """A > B in one place and B > A in another, for the same prompt."""
    straight, crossed = _joint(seen, "prompt", "chosen", "rejected"), _joint(seen, "prompt", "rejected", "chosen")
    both = np.isin(straight, crossed) & (seen.pairs.key("chosen") != seen.pairs.key("rejected"))
    measure = Measure(
        "contradictory pairs (A over B, and B over A)",
        "their gradients cancel; one label is wrong. If both must stay, --label_smoothing 0.1 allows for wrong labels",
        spoils=0.01,
        fix=FixAction.DROP,
    )
    return [_of_pairs("contradictory_pairs", measure, both, seen)]


def duplicate_prompts(seen: Seen) -> list[Finding]:
    """Rows whose prompt an earlier row had; the pairs of one row do not count."""
    rows, first = np.unique(seen.pairs.row, return_index=True)
    later = rows[_repeated(seen.pairs.key("prompt")[first])]
    measure = Measure(
        "prompts that were there before", "they share a tree; the validation split keeps them on one side", note=0.005
    )
    return [make_finding("duplicate_prompts", measure, len(later), len(rows), later)]


def length_bias(seen: Seen) -> list[Finding]:
    """How well "the longer answer is the better one" tells the chosen answer from the rejected one.

    The AUC of a pair's length as a score is the share of pairs whose chosen answer is longer, ties counting half.
    """
    use = seen.pairs.trainable
    chosen, rejected = seen.pairs.length("chosen")[use], seen.pairs.length("rejected")[use]
    longer, auc = int(np.sum(chosen > rejected)), auc_longer(chosen, rejected)
    side, best = ("longer", auc) if auc >= 0.5 else ("shorter", 1 - auc)
    measure = Measure("length bias", "")
    finding = make_finding(
        "length_bias", measure, longer if side == "longer" else int(np.sum(chosen < rejected)), len(chosen)
    )
    finding.unit = "pairs"
    if not len(chosen):
        return [finding]
    sure = best - 0.5 > 1 / math.sqrt(len(chosen))  # two standard errors of a coin
    finding.level = next((level for limit, level in LENGTH_LIMITS.items() if sure and best >= limit), FINE)
    if finding.level != FINE:
        finding.what = f"length bias: the {side} answer is the chosen one"
    finding.why = _length_verdict(side, best)
    finding.detail = f'AUC of "longer is better" {auc:.3f}, of "shorter is better" {1 - auc:.3f}'
    return [finding]


#: Losses, by the names that --loss_type takes, that average over tokens or correct for the answers' lengths.
LENGTH_LOSSES = ("sigmoid_norm", "ipo", "simpo", "rdpo")

LENGTH_LIMITS = {0.75: SPOILS, 0.6: NOTE}
"""AUC of the better of the two rules from which on a length bias has this level."""


def auc_longer(chosen: NDArray[np.int32], rejected: NDArray[np.int32]) -> float:
    """Share of pairs with a longer chosen answer, ties half; 0.5 without pairs."""
    return float(np.mean(chosen > rejected) + np.mean(chosen == rejected) / 2) if len(chosen) else 0.5


def _length_verdict(side: str, best: float) -> str:
    if best < 0.6:
        return "length says little about which answer is better"
    strong = "a model that only counts words" if best >= 0.75 else "counting words"
    more = "more" if side == "longer" else "less"
    advice = (
        f"add pairs in which the other side is longer, or correct for length: --loss_type {' or '.join(LENGTH_LOSSES)}"
    )
    return f"{strong} would get {best:.0%} of the pairs right, so the model may learn to write {more}; {advice}"


def _joint(seen: Seen, *names: str) -> NDArray[np.uint64]:
    """One 64-bit key for several texts of a pair (a multiplicative hash of their hashes)."""
    key = np.zeros(len(seen.pairs), np.uint64)
    for name in names:
        key = (key ^ seen.pairs.key(name)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _repeated(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which entries equal an earlier one."""
    later = np.ones(len(keys), bool)
    later[np.unique(keys, return_index=True)[1]] = False
    return later


def _of_pairs(key: str, measure: Measure, which: NDArray[np.bool_], seen: Seen) -> Finding:
    rows: Rows = seen.pairs.row[which]
    return make_finding(key, measure, int(which.sum()), len(seen.pairs), rows, unit="pairs")


SET_CHECKS: dict[str, Callable[[Seen], list[Finding]]] = {
    "unreadable_files": unreadable_files,
    "missing_rows": missing_rows,
    "read_otherwise": read_otherwise,
    "single_rows": single_rows,
    "duplicate_pairs": duplicate_pairs,
    "contradictory_pairs": contradictory_pairs,
    "duplicate_prompts": duplicate_prompts,
    "length_bias": length_bias,
}
"""Name -> function of what was seen."""
