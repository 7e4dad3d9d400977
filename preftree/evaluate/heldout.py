"""Held-out pairs beside the tasks: encoded before anything is computed, scored, written and read back.

OUT/preferences.jsonl     log-probs of each pair's answers, one pair per line
OUT/preferences.json      what they say together (`PreferenceReport`), and how many were dropped or cut
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from preftree.data.encode import BATCH, EncodedPair, PairEncoder, PairFate
from preftree.data.record import PreferencePair
from preftree.errors import DataError, ModelError
from preftree.evaluate.preference import (
    AnswerTooLong,
    PairScores,
    PreferenceReport,
    preference_report,
    score_pairs,
)
from preftree.io.atomic import atomic_file, write_json
from preftree.io.jsonl import read_jsonl
from preftree.model.score import Scorer

SUMMARY, DETAILS = "preferences.json", "preferences.jsonl"

#: A length that no pair reaches: pairs are first encoded whole, to see which are too long for the model.
_UNCUT = 2**30


class Encoder(Protocol):
    """What is needed of an evaluated model to encode pairs for it."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def max_length(self) -> int: ...
    def say(self, text: str) -> None: ...


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Encoded pairs of a file with a hash of each one's texts, and what became of the others."""

    file: str
    pairs: list[EncodedPair]
    keys: list[str]
    read: int
    dropped: Counter[str]
    cut: int


def encode_heldout(file: str, pairs: Sequence[PreferencePair], lm: Encoder, truncate: bool) -> HeldOut:
    """Encode held-out pairs for a model, and say what is dropped or cut.

    A pair that is longer than the model's positions is refused as a task's question is, or cut with `truncate`.

    Raises:
        DataError: no pair is left.
        ModelError: pairs are longer than the model's positions, without `truncate`.
    """
    fates, limit = _fates(pairs, lm.tokenizer, _UNCUT, _UNCUT - 1), lm.max_length
    too_long = [i for i, fate in enumerate(fates) if fate.encoded is not None and _longest(fate.encoded) > limit]
    if too_long:
        over = max(_longest(fates[i].encoded) for i in too_long) - limit  # type: ignore[arg-type]
        words = (
            f"{len(too_long)} of {len(pairs)} held-out pairs are longer than the model's {limit} positions, by up to "
            f"{over} tokens (the first is {pairs[too_long[0]].source})"
        )
        if not truncate:
            raise ModelError(f"--preferences {file}: {words}. Leave them out, or give --truncate to cut them")
        lm.say(f"note: {words}: they are cut")
        # Prompts to half of the positions, answers to the rest.
        cut = _fates([pairs[i] for i in too_long], lm.tokenizer, limit, max(1, limit // 2))
        for i, fate in zip(too_long, cut, strict=True):
            fates[i] = fate
    dropped = Counter(fate.reason for fate in fates if fate.encoded is None)
    reasons = "; ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
    kept = [(pair, fate.encoded) for pair, fate in zip(pairs, fates, strict=True) if fate.encoded is not None]
    if not kept:
        raise DataError(f"--preferences {file}: none of its {len(pairs)} pairs can be scored ({reasons})")
    if dropped:
        lm.say(f"note: {dropped.total()} of {len(pairs)} held-out pairs are dropped ({reasons})")
    return HeldOut(
        file, [pair for _, pair in kept], [_key(pair) for pair, _ in kept], len(pairs), dropped, len(too_long)
    )


def _fates(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> list[PairFate]:
    """What encoding makes of each pair."""
    encoder = PairEncoder(tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    batches = (pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH))
    return [fate for batch in encoder.stream(batches) for fate in batch]


def _longest(pair: EncodedPair) -> int:
    """Tokens of the longer one of a pair's two sequences."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


@dataclass(frozen=True, eq=False)
class ScoredHeldOut:
    """Held-out pairs with their log-probs under a model, and without its adapter if it has one."""

    heldout: HeldOut
    scores: PairScores
    without: PairScores | None

    @property
    def report(self) -> PreferenceReport:
        """What the pairs say together."""
        chosen_P = torch.tensor([len(pair.chosen_ids) for pair in self.heldout.pairs])
        rejected_P = torch.tensor([len(pair.rejected_ids) for pair in self.heldout.pairs])
        return preference_report(self.scores, chosen_P, rejected_P, self.without)

    def write(self, out: str) -> None:
        """Write both files into `out`, the summary last."""
        with atomic_file(Path(out) / DETAILS, "w") as file:
            for row in self._rows():
                file.write(json.dumps(row) + "\n")
        heldout = self.heldout
        lost = {"read": heldout.read, "dropped": dict(heldout.dropped), "cut": heldout.cut}
        write_json(Path(out) / SUMMARY, {"file": heldout.file, **lost, **asdict(self.report)})

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for i, pair in enumerate(self.heldout.pairs):
            row: dict[str, Any] = {"pair": self.heldout.keys[i], "source": pair.source}
            row |= {"chosen": float(self.scores.chosen_P[i]), "rejected": float(self.scores.rejected_P[i])}
            row |= {"chosen_tokens": len(pair.chosen_ids), "rejected_tokens": len(pair.rejected_ids)}
            rows.append(row)
        return rows

    def table(self) -> Table:
        """The report for a terminal."""
        report = self.report
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
        add("DPO's implicit reward ranks correctly", report.reward_accuracy, ".1%")
        return table


def score_heldout(
    heldout: HeldOut,
    scorer: Scorer,
    budget: int,
    progress: Callable[[int, int], None] | None = None,
    shrunk: Callable[[int], None] | None = None,
) -> ScoredHeldOut:
    """Score pairs under a model, and without its adapter if it has one.

    Raises:
        ModelError: one answer behind its prompt does not fit into memory.
    """
    try:
        scores, without = score_pairs(scorer, heldout.pairs, budget, progress, shrunk), None
        if isinstance(scorer.model, PeftModel):
            with scorer.model.disable_adapter():
                without = score_pairs(scorer, heldout.pairs, budget, progress, shrunk)
    except AnswerTooLong as error:
        source, answer = heldout.pairs[error.leaf // 2].source, ("chosen", "rejected")[error.leaf % 2]
        raise ModelError(
            f"--preferences: out of memory on the {answer} answer of {source} with its prompt ({error.tokens} tokens). "
            "Give a lower --max_length with --truncate, leave the pair out, or take a device with more memory"
        ) from error
    return ScoredHeldOut(heldout, scores, without)


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """What an evaluation wrote of its held-out pairs, in the file's order.

    Args:
        keys: tell pairs apart by their texts.
        right_P: 1 where the chosen answer is the more probable one, else 0.
        margin_P: log p(chosen) − log p(rejected), in nats.
    """

    keys: tuple[str, ...]
    right_P: np.ndarray
    margin_P: np.ndarray


def read_heldout(folder: Path) -> HeldOutScores | None:
    """The held-out pairs of an evaluation, None if it had none.

    Raises:
        DataError, KeyError, TypeError, ValueError: the file is damaged.
    """
    rows = list(read_jsonl(folder / DETAILS))
    if not rows:
        return None
    chosen_P, rejected_P = (np.array([float(row[name]) for row in rows]) for name in ("chosen", "rejected"))
    if not (np.isfinite(chosen_P).all() and np.isfinite(rejected_P).all()):
        raise ValueError("a log-prob is not a finite number")
    right_P = (chosen_P > rejected_P).astype(float)
    return HeldOutScores(tuple(str(row["pair"]) for row in rows), right_P, chosen_P - rejected_P)


def _key(pair: PreferencePair) -> str:
    """A hash of a pair's texts: the same under every tokenizer."""
    texts = repr((pair.system, pair.turns, pair.chosen, pair.rejected))
    return xxhash.xxh3_64_hexdigest(texts.encode("utf-8", errors="backslashreplace"))
