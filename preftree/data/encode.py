"""Preference pairs -> token ids, so that training sees exactly the context that generation will see.

- The prompt is what `apply_chat_template(add_generation_prompt=True)` gives. A tokenizer without a chat
  template gets `PLAIN_CHAT_TEMPLATE`, and before it the BOS that the tokenizer itself would put there.
- A response is what the rendered conversation adds to the prompt (`render.py` says what else it may be), up to and
  including the token that ends the assistant's turn, and nothing after it. That token, the terminator, is the first
  control token that the template writes behind an answer (`<|im_end|>`, `<end_of_turn>`, `</s>`, …), else the
  tokenizer's EOS: generation has to stop at it. Terminator or EOS inside an answer end it: generation could not go
  past them.
- Prompt ids are a prefix of the ids of prompt + response. Where a merge of tokens across the boundary breaks that,
  the response is encoded on its own: a boundary repair.
- A prompt longer than `max_prompt_length` keeps its end (and a BOS at its start). Of a pair longer than `max_length`,
  `keep_start` cuts the responses, which then have no terminator, and `keep_end` the prompt's beginning.
- Texts are not stripped here; a template may do so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from preftree.data.chat import Chat
from preftree.data.record import PreferencePair
from preftree.data.render import (
    CHOSEN_EMPTY,
    IDENTICAL,
    IDENTICAL_WRITTEN,
    PROMPT_EMPTY,
    REJECTED_EMPTY,
    Rendered,
    UnusableError,
    render,
)
from preftree.data.time_limit import time_limit
from preftree.errors import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDENTICAL_CUT = "chosen and rejected became identical by cutting them to max_length"
PROMPT_TOO_LONG = "the prompt alone is as long as max_length"

#: Pairs that are tokenized in one call.
BATCH = 256
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
        said = [f"Encoded {self.kept} of {self.read} pairs: {tokens}. Answers end with {self.terminator}."]
        said += [f"Dropped {count} pairs: {reason}." for reason, count in self.dropped.items()]
        counts = {
            "prompts were cut to max_prompt_length, keeping their end": self.prompts_cut,
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


class PairEncoder:
    """Encodes pairs batch by batch, as the module's docstring says; `report` counts what it did.

    Pairs of token ids (`EncodedPair`) may stand among the others: they are only cut.

    Args:
        max_length: longest prompt + response in tokens; None cuts nothing.
        max_prompt_length: longest prompt in tokens; None leaves it to `max_length`.
        truncation_mode: one of `TRUNCATION_MODES`, what of a pair longer than `max_length` is kept.

    Raises:
        SettingsError: the lengths contradict each other or leave no room for the assistant header.
        ModelError: the tokenizer has no end token, or its template cannot render question and answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
        max_prompt_length: int | None = None,
        truncation_mode: str = "keep_start",
    ) -> None:
        _check_lengths(max_length, max_prompt_length, truncation_mode)
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.truncation_mode = truncation_mode
        self.chat = chat = Chat(tokenizer)
        for name, length in (("max_prompt_length", max_prompt_length), ("max_length", max_length)):
            if length is not None and chat.header_tokens >= length:
                raise SettingsError(
                    f"{name} must be greater than {chat.header_tokens}, the number of tokens that open "
                    f"the assistant's turn. Got {length} instead."
                )
        # One thread, which waits for the tokenizer's own: Python renders the next batch meanwhile.
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self.report = EncodeReport(terminator=chat.terminator, terminator_id=chat.terminator_id, notes=chat.notes)

    def encode(self, pairs: Sequence[PreferencePair | EncodedPair]) -> list[PairFate]:
        """What becomes of each of `pairs`, with one call of the tokenizer; some hundred pairs are enough."""
        return self.begin(pairs)()

    def begin(self, pairs: Sequence[PreferencePair | EncodedPair]) -> Callable[[], list[PairFate]]:
        """`encode` in two parts: the tokenizer works while the caller does something else, until it calls the result.

        To be called once, in the order of the batches, as each counts its pairs in `report`.
        """
        with time_limit():
            begun = [pair if isinstance(pair, EncodedPair) else _item(pair, self.chat) for pair in pairs]
        items = [item for item in begun if isinstance(item, _Item)]
        ids = self._thread.submit(self.chat.tokenize, _texts(items))

        def fates() -> list[PairFate]:
            _fill_in(items, ids.result(), self.chat)
            found = [self._fate(item) for item in begun]
            for fate in found:
                self.report.add(fate)
            return found

        return fates

    def stream(self, batches: Iterable[Sequence[PreferencePair | EncodedPair]]) -> Iterator[list[PairFate]]:
        """`encode` for one batch after another, each rendered while the one before it is tokenized."""
        waiting: Callable[[], list[PairFate]] | None = None
        for batch in batches:
            begun = self.begin(batch)
            if waiting is not None:
                yield waiting()
            waiting = begun
        if waiting is not None:
            yield waiting()

    def _fate(self, item: _Item | EncodedPair | str) -> PairFate:
        """The pair within its lengths, or the reason why that leaves nothing to prefer."""
        if isinstance(item, str):
            return PairFate(reason=item)
        if isinstance(item, EncodedPair):
            return self._within(_listed(item, shortest=1), shortest=1)
        answers, early_ends = zip(*map(self.chat.ended, item.response_ids), strict=True)
        chosen, rejected, *others = map(tuple, answers)
        pair = item.pair
        whole = EncodedPair(
            tuple(item.prompt_ids), chosen, rejected, pair.row, pair.source, tuple(others), pair.ranks
        )  # fmt: skip
        listed = _listed(whole, shortest=2)
        fate = self._within(listed, shortest=2)
        if fate.reason == IDENTICAL and pair.chosen_keys != pair.rejected_keys:
            fate = replace(fate, reason=IDENTICAL_WRITTEN)
        return replace(
            fate,
            repairs=item.repairs,
            early_ends=sum(early_ends),
            unlisted=fate.unlisted + len(whole.answers) - len(listed.answers),
            folded=item.texts.folded,
            events=item.texts.events,
        )

    def _within(self, whole: EncodedPair, shortest: int) -> PairFate:
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
        return PairFate(left, "", sizes, answers_cut=shortened, unlisted=len(cut.answers) - len(left.answers))

    def _cut(self, whole: EncodedPair) -> EncodedPair:
        """Prompt and answers within the lengths. All answers keep the same prompt, so that they stay one tree."""
        prompt, answers = whole.prompt_ids, whole.answers
        if self.max_prompt_length is not None:
            prompt = self.chat.cut_prompt(prompt, self.max_prompt_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            room = self.max_length - 1  # a prompt of one token at least: what an answer's first one is scored after
            answers = tuple(answer[-room:] for answer in answers)
            prompt = self.chat.cut_prompt(prompt, self.max_length - max(map(len, answers)))
        elif self.max_length is not None:
            room = max(self.max_length - len(prompt), 0)
            answers = tuple(answer[:room] for answer in answers)
        chosen, rejected, *others = answers
        return replace(whole, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, others=tuple(others))


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[EncodedPair], EncodeReport]:
    """Encodes `pairs` in order, as the module's docstring says, and reports on it.

    Arguments and errors are those of `PairEncoder`. `progress` is called with (pairs done, pairs in all) after each
    batch. Pairs that end up empty or identical are dropped and counted, never an error.
    """
    encoder = PairEncoder(
        tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, truncation_mode=truncation_mode
    )
    encoded: list[EncodedPair] = []
    for fates in encoder.stream(pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)):
        encoded += [fate.encoded for fate in fates if fate.encoded is not None]
        if progress is not None:
            progress(encoder.report.read, len(pairs))
    return encoded, encoder.report


def _check_lengths(max_length: int | None, max_prompt_length: int | None, truncation_mode: str) -> None:
    if truncation_mode not in TRUNCATION_MODES:
        raise SettingsError(
            f"truncation_mode must be {' or '.join(TRUNCATION_MODES)}. Got {truncation_mode!r} instead."
        )
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        got = f"Got max_prompt_length {max_prompt_length} and max_length {max_length} instead."
        raise SettingsError(f"max_prompt_length must be less than max_length, to leave room for an answer. {got}")


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


# --- one batch: render, tokenize, cut -------------------------------------------------------------


@dataclass(slots=True)
class _Item:
    """A pair on its way: its rendered texts, then its uncut ids."""

    pair: PreferencePair
    texts: Rendered
    context: str  # the end of the prompt that is enough to see what a token at the boundary would merge
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[list[int]] = field(default_factory=list)
    repairs: int = 0


def _item(pair: PreferencePair, chat: Chat) -> _Item | str:
    """A pair with its texts, or the reason why it has nothing to learn from."""
    try:
        texts = render(pair, chat)
    except UnusableError as reason:
        return str(reason)
    return _Item(pair, texts, chat.context(texts.prompt))


def _texts(items: list[_Item]) -> set[str]:
    """What the tokenizer has to be asked, each text once."""
    texts = {text for item in items for text in (item.texts.prompt, item.context)}
    return texts | {item.context + response for item in items for response in item.texts.responses}


def _fill_in(items: list[_Item], ids: dict[str, list[int]], chat: Chat) -> None:
    """Takes each item's ids from those of `_texts`, with another call of the tokenizer for repairs."""
    broken: list[tuple[_Item, int]] = []
    for item in items:
        prompt, context = ids[item.texts.prompt], ids[item.context]
        item.prompt_ids = chat.with_bos(prompt)
        for side, response in enumerate(item.texts.responses):
            joined = ids[item.context + response]
            item.response_ids.append(joined[len(context) :])
            # No token reaches across the boundary: the joined ids go on from the prompt's.
            if joined[: len(context)] != context or prompt[len(prompt) - len(context) :] != context:
                broken.append((item, side))
    alone = chat.tokenize({item.texts.responses[side] for item, side in broken})
    for item, side in broken:
        item.response_ids[side] = alone[item.texts.responses[side]]
        item.repairs += 1
