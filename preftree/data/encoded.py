"""What becomes of a pair's token ids: cut to its lengths, kept, or dropped for a reason that is counted.

One place for all who encode: `encode.PairEncoder`, and `train.rows.RowEncoder` for TRL's layouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from preftree.data.render import CHOSEN_EMPTY, IDENTICAL, PROMPT_EMPTY, REJECTED_EMPTY
from preftree.errors import SettingsError

IDENTICAL_CUT = "chosen and rejected became identical by cutting them to max_length"
PROMPT_TOO_LONG = "the prompt alone is as long as max_length"
TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of one pair. A sequence is `prompt_ids` + `chosen_ids` or `prompt_ids` + `rejected_ids`; only
    the response's tokens are scored. `row`, `source`, `others` and `ranks` are as in `PreferencePair`."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    row: int
    source: str
    others: tuple[tuple[int, ...], ...] = ()
    ranks: tuple[int, ...] = (1, 2)

    @property
    def answers(self) -> tuple[tuple[int, ...], ...]:
        """Chosen, rejected and other answers, in the order of `ranks`."""
        return (self.chosen_ids, self.rejected_ids, *self.others)

    @property
    def size(self) -> int:
        """Tokens of the pair as a tree: the prompt once, and all answers."""
        return len(self.prompt_ids) + sum(map(len, self.answers))


@dataclass(slots=True)
class EncodeReport:
    """What encoding did. `read`, `kept` and `dropped` (reason -> count) count all pairs, the rest kept ones.

    `prompts_cut` and `systems_folded` count prompts. `responses_cut`, `boundary_repairs` (encoded on their own),
    `early_ends` (with a terminator or EOS in their text) and `unlisted` (dropped from a ranked list that goes on
    without them: empty, or the same as a better one) count responses. `events` (what happened -> count)
    counts the pairs that have tokens, as `render.py` names it. `terminator` is the token
    at which generation has to stop, `notes` what is peculiar about this tokenizer.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    responses_cut: int = 0
    boundary_repairs: int = 0
    early_ends: int = 0
    systems_folded: int = 0
    unlisted: int = 0
    events: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    response_tokens: int = 0
    terminator: str = ""
    terminator_id: int = -1
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Plain sentences for people; nothing is said of what did not happen."""
        tokens = f"{self.prompt_tokens} prompt tokens and {self.response_tokens} response tokens"
        ends = f" Answers end with {self.terminator}." if self.terminator else ""
        said = [f"Encoded {self.kept} of {self.read} pairs: {tokens}.{ends}"]
        said += [f"Dropped {count} pairs: {reason}." for reason, count in self.dropped.items()]
        counts = {
            "prompts were cut, keeping their end": self.prompts_cut,
            "responses were cut to max_length and have no end token": self.responses_cut,
            "responses were encoded on their own, as a token crossed the prompt's end": self.boundary_repairs,
            "responses held an end token in their text and were ended there": self.early_ends,
            "system texts were put into the first user turn, for want of a system role": self.systems_folded,
            "ranked answers were left out, as they are empty or the same as a better one": self.unlisted,
        }
        counts |= self.events
        return said + [f"{count} {text}." for text, count in counts.items() if count] + self.notes

    def add(self, fate: PairFate) -> None:
        """Count one pair."""
        self.read += 1
        self.events.update(fate.events)
        if fate.encoded is None:
            self.dropped[fate.reason] += 1
            return
        pair = fate.encoded
        self.kept += 1
        self.early_ends += fate.early_ends
        self.boundary_repairs += fate.repairs
        self.systems_folded += fate.folded
        self.prompts_cut += fate.prompt_cut
        self.responses_cut += fate.answers_cut
        self.unlisted += fate.unlisted
        self.prompt_tokens += len(pair.prompt_ids)
        self.response_tokens += sum(map(len, pair.answers))


@dataclass(frozen=True, slots=True)
class PairFate:
    """What encoding made of one pair.

    `encoded` is None where the pair was dropped, for `reason`. `sizes` are the tokens of prompt, chosen and
    rejected answer before anything was cut (zeros where a pair was dropped before it had tokens). `repairs`,
    `early_ends`, `answers_cut` and `unlisted` count its answers, `folded` says whether its system text went into the
    first user turn, `events` are what else is worth counting (`render.py`).
    """

    encoded: EncodedPair | None = None
    reason: str = ""
    sizes: tuple[int, int, int] = (0, 0, 0)
    repairs: int = 0
    early_ends: int = 0
    answers_cut: int = 0
    unlisted: int = 0
    folded: bool = False
    events: tuple[str, ...] = ()

    @property
    def prompt_cut(self) -> bool:
        """Was the prompt cut?"""
        return self.encoded is not None and len(self.encoded.prompt_ids) < self.sizes[0]


@dataclass(frozen=True)
class Lengths:
    """What bounds a pair.

    Args:
        max_length: longest prompt + response in tokens; None cuts nothing.
        max_prompt_length: longest prompt in tokens; None leaves it to `max_length`.
        truncation_mode: one of `TRUNCATION_MODES`, what of a pair longer than `max_length` is kept.
        cut_prompt: a prompt's ids and a length -> the ids that are kept.

    Raises:
        SettingsError: the lengths contradict each other.
    """

    max_length: int | None
    max_prompt_length: int | None
    truncation_mode: str
    cut_prompt: Callable[[tuple[int, ...], int], tuple[int, ...]]

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise SettingsError(
                f"truncation_mode must be {' or '.join(TRUNCATION_MODES)}. Got {self.truncation_mode!r} instead."
            )
        longest, prompt = self.max_length, self.max_prompt_length
        if longest is not None and prompt is not None and prompt >= longest:
            got = f"Got max_prompt_length {prompt} and max_length {longest} instead."
            raise SettingsError(f"max_prompt_length must be less than max_length, to leave room for an answer. {got}")

    def fate(self, given: EncodedPair, shortest: int) -> PairFate:
        """The pair within its lengths, or the reason why that leaves nothing to prefer.

        Args:
            shortest: tokens that an answer must have before it is cut, its end token counted where it has one.
        """
        whole = _listed(given, shortest)
        reason = _nothing_in(whole, shortest)
        cut = self._cut(whole)
        left = _listed(cut, shortest=1)
        sizes = len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)
        if not reason and not (left.chosen_ids and left.rejected_ids):
            reason = PROMPT_TOO_LONG
        if not reason and left.chosen_ids == left.rejected_ids:
            reason = IDENTICAL_CUT
        if reason:
            return PairFate(reason=reason, sizes=sizes)
        shortened = sum(len(a) < len(b) for a, b in zip(cut.answers, whole.answers, strict=True))
        return PairFate(left, "", sizes, answers_cut=shortened, unlisted=len(given.answers) - len(left.answers))

    def _cut(self, whole: EncodedPair) -> EncodedPair:
        """Prompt and answers within the lengths. All answers keep the same prompt, so that they stay one tree."""
        prompt, answers = whole.prompt_ids, whole.answers
        if self.max_prompt_length is not None:
            prompt = self.cut_prompt(prompt, self.max_prompt_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            room = self.max_length - 1  # a prompt of one token at least: what an answer's first one is scored after
            answers = tuple(answer[-room:] for answer in answers)
            prompt = self.cut_prompt(prompt, self.max_length - max(map(len, answers)))
        elif self.max_length is not None:
            room = max(self.max_length - len(prompt), 0)
            answers = tuple(answer[:room] for answer in answers)
        chosen, rejected, *others = answers
        return replace(whole, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, others=tuple(others))


def _listed(pair: EncodedPair, shortest: int) -> EncodedPair:
    """A ranked list without answers that are too short or the same as a better one; a pair as it is.

    Where no two ranks are left, chosen and rejected are the same.
    """
    if not pair.others:
        return pair
    kept: dict[tuple[int, ...], int] = {}
    for rank, answer in sorted(zip(pair.ranks, pair.answers, strict=True), key=lambda ranked: ranked[0]):
        if len(answer) >= shortest:
            kept.setdefault(answer, rank)
    if len(set(kept.values())) < 2:
        best = next(iter(kept), ())
        return replace(pair, chosen_ids=best, rejected_ids=best, others=(), ranks=(1, 2))
    (chosen, first), *between, (rejected, last) = kept.items()
    ranks = (first, last, *(rank for _, rank in between))
    return replace(
        pair, chosen_ids=chosen, rejected_ids=rejected, others=tuple(answer for answer, _ in between), ranks=ranks
    )


def _nothing_in(pair: EncodedPair, shortest: int) -> str:
    """Why token ids have nothing to learn from; an answer of the end token alone is empty."""
    if not pair.prompt_ids:
        return PROMPT_EMPTY
    if len(pair.chosen_ids) < shortest:
        return CHOSEN_EMPTY
    if len(pair.rejected_ids) < shortest:
        return REJECTED_EMPTY
    return IDENTICAL if pair.chosen_ids == pair.rejected_ids else ""
