"""What a tokenizer and the chosen lengths do to the pairs. To add a measure: a line in `TOKEN_CHECKS`."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preftree.check.report import Finding, Histogram, Measure, histogram, make_finding
from preftree.data.encode import (
    BATCH,
    EncodedPair,
    PairEncoder,
    PairFate,
)
from preftree.data.record import PreferencePair
from preftree.data.render import CHOSEN_EMPTY, CONTINUED, IDENTICAL, PROMPT_EMPTY, REJECTED_EMPTY
from preftree.forest import bundles_of_pairs, grow

#: Pairs per batch in the comparison of padded batches and forests, and the most batches of each size.
BATCH_SIZES = (1, 2, 4, 8)
MAX_BATCHES = 200
#: Suggested lengths are multiples of this many tokens, and leave this share of the pairs whole.
STEP = 64
WHOLE = 0.99


class Tokens:
    """What is remembered of encoded pairs: their sizes, the rows that hit a check, and up to `keep` pairs themselves.

    Args:
        encoder: tokenizer, template and lengths.
        keep: how many encoded pairs to keep, for the comparison of layouts.
    """

    def __init__(self, encoder: PairEncoder, keep: int) -> None:
        self.encoder, self.keep = encoder, keep
        self.kept: list[EncodedPair] = []
        self._pairs = 0
        self._sizes = array("i")
        self._used = array("i")
        self._hit_rows: dict[str, array[int]] = {key: array("q") for key in TOKEN_CHECKS}
        self._left_out: dict[str, array[int]] = {}
        self._events: dict[str, array[int]] = {}
        self._waiting: list[tuple[int, PreferencePair]] = []
        self._begun: tuple[list[int], Callable[[], list[PairFate]]] | None = None

    def __len__(self) -> int:
        return self._pairs

    def add(self, row: int, pair: PreferencePair) -> None:
        """Encode one pair; really in batches, each in the background until the next is full, so `flush` at the end."""
        self._waiting.append((row, pair))
        if len(self._waiting) >= BATCH:
            self._begin()

    def flush(self) -> None:
        """Encode what waits."""
        if self._waiting:
            self._begin()
        self._finish()

    def _begin(self) -> None:
        rows = [row for row, _ in self._waiting]
        fates = self.encoder.begin([pair for _, pair in self._waiting])
        self._waiting.clear()
        self._finish()
        self._begun = rows, fates

    def _finish(self) -> None:
        if self._begun is None:
            return
        rows, fates = self._begun
        self._begun = None
        self._pairs += len(rows)
        for row, fate in zip(rows, fates(), strict=True):
            self._sizes.extend(fate.sizes)
            self._used.append(fate.encoded.size if fate.encoded else 0)
            for key, hit_rows in self._hit_rows.items():
                if TOKEN_CHECKS[key][0](fate):
                    hit_rows.append(row)
            if fate.encoded is None and (any(fate.sizes) or fate.reason not in SEEN_IN_TEXTS):
                self._left_out.setdefault(fate.reason, array("q")).append(row)
            for event in fate.events:
                if event in SEEN_IN_TEXTS:
                    continue
                self._events.setdefault(event, array("q")).append(row)
            if fate.encoded is not None and len(self.kept) < self.keep:
                self.kept.append(fate.encoded)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(pairs that have tokens, 3): uncut tokens of prompt, chosen and rejected answer."""
        sizes = np.array(self._sizes, np.int32).reshape(-1, 3)
        return sizes[sizes[:, 0] > 0]

    def findings(self, pairs: int) -> list[Finding]:
        """A finding for each of `TOKEN_CHECKS`, for each reason why pairs are left out, and for what else encoding
        reports; `pairs` is how many there are, of which these may be a sample."""
        return [
            *(self._finding(key, TOKEN_CHECKS[key][1], rows, pairs) for key, rows in self._hit_rows.items()),
            *(self._finding(f"left out: {why}", _left_out(why), rows, pairs) for why, rows in self._left_out.items()),
            *(self._finding(f"encoded: {what}", Measure(what, ""), rows, pairs) for what, rows in self._events.items()),
        ]

    def _finding(self, key: str, measure: Measure, rows: array[int], pairs: int) -> Finding:
        sampled = len(self) if len(self) < pairs else None
        found = np.array(rows, np.int64)
        return make_finding(key, measure, len(rows), len(self), found, unit="pairs", sampled=sampled)

    def facts(self, pairs: int) -> dict[str, Any]:
        """Token totals (for all `pairs`, as the sample has them), what trees save, suggested lengths."""
        sizes = self.sizes
        if not len(sizes):
            return {}
        encoder, report = self.encoder, self.encoder.report
        scale = pairs / max(report.read, 1)
        return {
            "prompt tokens (once per pair)": round(report.prompt_tokens * scale),
            "answer tokens": round(report.response_tokens * scale),
            **sampling_error(np.array(self._used), pairs),
            "answers end with": report.terminator,
            **padded_over_tree(self.kept),
            **suggestions(sizes, encoder.lengths.max_length or 0, encoder.lengths.max_prompt_length or 0),
        }

    def histograms(self) -> list[Histogram]:
        """Lengths in tokens, before cutting."""
        sizes = self.sizes
        series = {"prompt": sizes[:, 0], "chosen": sizes[:, 1], "rejected": sizes[:, 2]}
        return [histogram("Before cutting", "tokens", series)] if len(sizes) else []


SEEN_IN_TEXTS = frozenset({PROMPT_EMPTY, CHOSEN_EMPTY, REJECTED_EMPTY, IDENTICAL, CONTINUED})
"""What other checks see without a tokenizer: pairs that are left out before they have tokens, and prefilled answers."""


def _left_out(reason: str) -> Measure:
    """What it means that encoding leaves pairs out for this reason."""
    return Measure(f"pairs that training leaves out: {reason}", "see --show, the data or the template", spoils=0.05)


TOKEN_CHECKS: dict[str, tuple[Callable[[PairFate], object], Measure]] = {
    "prompts_cut": (
        lambda fate: fate.prompt_cut,
        Measure(
            "prompts cut to max_prompt_length",
            "their beginning is lost; raise max_prompt_length",
            spoils=0.25,
            note=0.001,
        ),
    ),
    "answers_cut": (
        lambda fate: fate.answers_cut,
        Measure(
            "pairs with an answer cut to max_length, so without an end token",
            "the model does not learn to end there; raise max_length",
            spoils=0.25,
            note=0.001,
        ),
    ),
    "boundary_repairs": (
        lambda fate: fate.repairs,
        Measure(
            "pairs whose answer is encoded on its own",
            "a token would reach from the prompt into the answer; repaired, so that training sees what generation will",
        ),
    ),
    "early_ends": (
        lambda fate: fate.early_ends,
        Measure("answers with an end token in their text", "they are ended there", spoils=0.05),
    ),
}
"""Name -> function of what became of a pair, and what it means."""


def sampling_error(used: NDArray[np.int32], pairs: int) -> dict[str, str]:
    """How far the total of `used` tokens, seen in a sample of `pairs`, may be off: 95 of 100 times by no more.

    The standard error of a mean, with the correction for a finite population; nothing where all pairs were seen.
    """
    seen = len(used)
    if not 1 < seen < pairs or not used.any():
        return {}
    error = 1.96 * used.std(ddof=1) / used.mean() * math.sqrt((1 / seen) * (1 - seen / pairs))
    return {"tokens are estimated": f"± {100 * error:.1f} % (95 of 100 times), from {seen} of {pairs} pairs"}


def padded_over_tree(pairs: Sequence[EncodedPair], seed: int = 0) -> dict[str, Any]:
    """Tokens of padded batches divided by the tokens of their trees, for random batches of `pairs`."""
    order = list(pairs)
    random.Random(seed).shuffle(order)
    saved: dict[str, Any] = {}
    for size in BATCH_SIZES:
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)][:MAX_BATCHES]
        padded = sum(_padded(batch) for batch in batches)
        trees = sum(tree.size for batch in batches for tree in grow(bundles_of_pairs(batch)))
        if trees:
            saved[f"padded tokens per tree token, {size} {'pair' if size == 1 else 'pairs'} per batch"] = round(
                padded / trees, 2
            )
    return saved


def _padded(batch: Sequence[EncodedPair]) -> int:
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in batch)
    return 2 * len(batch) * longest


def suggestions(sizes: NDArray[np.int32], max_length: int, max_prompt_length: int) -> dict[str, Any]:
    """Lengths that leave 99 % of the prompts and pairs uncut, and how many the given lengths leave uncut."""
    whole = sizes[:, 0] + sizes[:, 1:].max(axis=1)
    prompt = _rounded(sizes[:, 0])
    length = max(_rounded(whole), prompt + STEP)
    kept = int(np.mean((sizes[:, 0] <= max_prompt_length) & (whole <= max_length)) * 1000) / 10
    return {
        "pairs left whole": f"{kept:g} % at max_length {max_length}, max_prompt_length {max_prompt_length}",
        "suggested max_length": length,
        "suggested max_prompt_length": prompt,
    }


def _rounded(lengths: NDArray[np.int32]) -> int:
    return int(-(-np.quantile(lengths, WHOLE, method="higher") // STEP) * STEP)
