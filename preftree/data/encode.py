"""Preference pairs -> token ids, so that training sees exactly the context that generation will see.

- The prompt is what `apply_chat_template(add_generation_prompt=True)` gives. A tokenizer without a chat
  template gets `PLAIN_CHAT_TEMPLATE`, and before it the BOS that the tokenizer itself would put there.
- A response is what the rendered conversation adds to the prompt, up to and including the token that ends
  the assistant's turn, and nothing after it. That token, the terminator, is the first control token that the
  template writes behind an answer (`<|im_end|>`, `<end_of_turn>`, `</s>`, …), else the tokenizer's EOS:
  generation has to stop at it. Terminator or EOS inside an answer end it: generation could not go past them.
- Prompt ids are a prefix of the ids of prompt + response. Where the template or a merge of tokens across the
  boundary breaks that, the response is encoded on its own: a boundary repair.
- A prompt longer than `max_prompt_length` keeps its end (and a BOS at its start), a response is cut to
  `max_length` - prompt; a cut response has no terminator.
- Texts are not stripped here; a template may do so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from preftree.data.chat import Chat
from preftree.data.record import PreferencePair
from preftree.errors import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_EMPTY = "the prompt is empty"
PROMPT_REFUSED = "the chat template refuses the conversation"
CHOSEN_EMPTY = "the chosen answer is empty"
REJECTED_EMPTY = "the rejected answer is empty"
IDENTICAL = "chosen and rejected are identical"
IDENTICAL_CUT = "chosen and rejected became identical by cutting them to max_length"

#: Pairs that are tokenized in one call.
BATCH = 256


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of one pair. A sequence is `prompt_ids` + `chosen_ids` or `prompt_ids` + `rejected_ids`; only
    the response's tokens are scored. `row` and `source` are those of the `PreferencePair`."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    row: int
    source: str

    @property
    def size(self) -> int:
        """Tokens of the pair as a tree: the prompt once, and both answers."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(slots=True)
class EncodeReport:
    """What encoding did. `read`, `kept` and `dropped` (reason -> count) count all pairs, the rest kept ones.

    `prompts_cut` and `systems_folded` count prompts. `responses_cut`, `boundary_repairs` (encoded on their
    own) and `early_ends` (with a terminator or EOS in their text) count responses. `terminator` is the token
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
        }
        return said + [f"{count} {text}." for text, count in counts.items() if count] + self.notes

    def add(self, fate: PairFate) -> None:
        """Count one pair."""
        self.read += 1
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
        self.prompt_tokens += len(pair.prompt_ids)
        self.response_tokens += len(pair.chosen_ids) + len(pair.rejected_ids)


@dataclass(frozen=True, slots=True)
class PairFate:
    """What encoding made of one pair.

    `encoded` is None where the pair was dropped, for `reason`. `sizes` are the tokens of prompt, chosen and
    rejected answer before anything was cut (zeros where a pair was dropped before it had tokens). `repairs` and
    `early_ends` count its answers, `folded` says whether its system text went into the first user turn.
    """

    encoded: EncodedPair | None = None
    reason: str = ""
    sizes: tuple[int, int, int] = (0, 0, 0)
    repairs: int = 0
    early_ends: int = 0
    folded: bool = False

    @property
    def prompt_cut(self) -> bool:
        """Was the prompt cut?"""
        return self.encoded is not None and len(self.encoded.prompt_ids) < self.sizes[0]

    @property
    def answers_cut(self) -> int:
        """How many of the two answers were cut."""
        pair = self.encoded
        if pair is None:
            return 0
        return (len(pair.chosen_ids) < self.sizes[1]) + (len(pair.rejected_ids) < self.sizes[2])


class PairEncoder:
    """Encodes pairs batch by batch, as the module's docstring says; `report` counts what it did.

    Arguments and errors are those of `encode_pairs`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, max_prompt_length: int) -> None:
        _check_lengths(max_length, max_prompt_length)
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.chat = chat = Chat(tokenizer)
        if chat.header_tokens >= max_prompt_length:
            raise SettingsError(
                f"max_prompt_length must be greater than {chat.header_tokens}, the number of tokens that open "
                f"the assistant's turn. Got {max_prompt_length} instead."
            )
        # One thread, which waits for the tokenizer's own: Python renders the next batch meanwhile.
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self.report = EncodeReport(terminator=chat.terminator, terminator_id=chat.terminator_id, notes=chat.notes)

    def encode(self, pairs: Sequence[PreferencePair]) -> list[PairFate]:
        """What becomes of each of `pairs`, with one call of the tokenizer; some hundred pairs are enough."""
        return self.begin(pairs)()

    def begin(self, pairs: Sequence[PreferencePair]) -> Callable[[], list[PairFate]]:
        """`encode` in two parts: the tokenizer works while the caller does something else, until it calls the result.

        To be called once, in the order of the batches, as each counts its pairs in `report`.
        """
        rendered = [_rendered(pair, self.chat) for pair in pairs]
        items = [item for item in rendered if isinstance(item, _Item)]
        ids = self._thread.submit(self.chat.tokenize, _texts(items))

        def fates() -> list[PairFate]:
            _fill_in(items, ids.result(), self.chat)
            found = [self._within(item) if isinstance(item, _Item) else PairFate(reason=item) for item in rendered]
            for fate in found:
                self.report.add(fate)
            return found

        return fates

    def stream(self, batches: Iterable[Sequence[PreferencePair]]) -> Iterator[list[PairFate]]:
        """`encode` for one batch after another, each rendered while the one before it is tokenized."""
        waiting: Callable[[], list[PairFate]] | None = None
        for batch in batches:
            begun = self.begin(batch)
            if waiting is not None:
                yield waiting()
            waiting = begun
        if waiting is not None:
            yield waiting()

    def _within(self, item: _Item) -> PairFate:
        """The pair within its lengths, or the reason why that leaves nothing to prefer."""
        pair, chat = item.pair, self.chat
        (full_chosen, early_chosen), (full_rejected, early_rejected) = map(chat.ended, item.response_ids)
        prompt = chat.cut_prompt(item.prompt_ids, self.max_prompt_length)
        room = self.max_length - len(prompt)
        chosen, rejected = full_chosen[:room], full_rejected[:room]
        sizes = len(item.prompt_ids), len(full_chosen), len(full_rejected)
        reason = ""
        if len(full_chosen) < 2:
            reason = CHOSEN_EMPTY
        elif len(full_rejected) < 2:
            reason = REJECTED_EMPTY
        elif chosen == rejected:
            reason = IDENTICAL if full_chosen == full_rejected else IDENTICAL_CUT
        if reason:
            return PairFate(reason=reason, sizes=sizes)
        return PairFate(
            EncodedPair(tuple(prompt), tuple(chosen), tuple(rejected), pair.row, pair.source),
            sizes=sizes,
            repairs=item.repairs,
            early_ends=early_chosen + early_rejected,
            folded=chat.folds_system and bool(pair.system),
        )


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[EncodedPair], EncodeReport]:
    """Encodes `pairs` in order, as the module's docstring says, and reports on it.

    `max_length` bounds prompt + response and `max_prompt_length` the prompt, both in tokens. `progress` is
    called with (pairs done, pairs in all) after each batch. Pairs that end up empty or identical are dropped
    and counted, never an error.

    Raises SettingsError where the lengths contradict each other or leave no room for the assistant header,
    and ModelError where the tokenizer has no end token or its template cannot render question and answer.
    """
    encoder = PairEncoder(tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    encoded: list[EncodedPair] = []
    for fates in encoder.stream(pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)):
        encoded += [fate.encoded for fate in fates if fate.encoded is not None]
        if progress is not None:
            progress(encoder.report.read, len(pairs))
    return encoded, encoder.report


def _check_lengths(max_length: int, max_prompt_length: int) -> None:
    if max_prompt_length >= max_length:
        got = f"Got max_prompt_length {max_prompt_length} and max_length {max_length} instead."
        raise SettingsError(f"max_prompt_length must be less than max_length, to leave room for an answer. {got}")


# --- one batch: render, tokenize, cut -------------------------------------------------------------


@dataclass(slots=True)
class _Item:
    """A pair on its way: its rendered texts, then its uncut ids."""

    pair: PreferencePair
    prompt: str
    context: str  # the end of `prompt` that is enough to see what a token at the boundary would merge
    responses: list[str]
    follows: list[bool]  # whether the rendered conversation begins with the rendered prompt
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[list[int]] = field(default_factory=list)
    repairs: int = 0


def _rendered(pair: PreferencePair, chat: Chat) -> _Item | str:
    """The texts of a pair, or the reason why it has nothing to learn from."""
    reason = ""
    if not (pair.system or "").strip() and not any(turn.content.strip() for turn in pair.turns):
        reason = PROMPT_EMPTY
    elif not pair.chosen.strip():
        reason = CHOSEN_EMPTY
    elif not pair.rejected.strip():
        reason = REJECTED_EMPTY
    elif pair.chosen == pair.rejected:
        reason = IDENTICAL
    if reason:
        return reason
    messages = chat.messages(pair.system, pair.turns)
    answers = (pair.chosen, pair.rejected)
    try:
        prompt = chat.prompt(messages)
        full = [chat.conversation(messages, answer) for answer in answers]
    except TemplateError as error:
        return f"{PROMPT_REFUSED} ({error})"
    follows = [text.startswith(prompt) for text in full]
    responses = [
        chat.without_tail(text[len(prompt) :] if fits else answer + chat.tail)
        for text, fits, answer in zip(full, follows, answers, strict=True)
    ]
    return _Item(pair, prompt, chat.context(prompt), responses, follows)


def _texts(items: list[_Item]) -> set[str]:
    """What the tokenizer has to be asked, each text once."""
    texts = {text for item in items for text in (item.prompt, item.context)}
    return texts | {item.context + response for item in items for response in item.responses}


def _fill_in(items: list[_Item], ids: dict[str, list[int]], chat: Chat) -> None:
    """Takes each item's ids from those of `_texts`, with another call of the tokenizer for repairs."""
    broken: list[tuple[_Item, int]] = []
    for item in items:
        prompt, context = ids[item.prompt], ids[item.context]
        item.prompt_ids = chat.with_bos(prompt)
        for side, (response, follows) in enumerate(zip(item.responses, item.follows, strict=True)):
            joined = ids[item.context + response]
            item.response_ids.append(joined[len(context) :])
            # No token reaches across the boundary: the joined ids go on from the prompt's.
            whole = joined[: len(context)] == context and prompt[len(prompt) - len(context) :] == context
            if not (follows and whole):
                broken.append((item, side))
    alone = chat.tokenize({item.responses[side] for item, side in broken})
    for item, side in broken:
        item.response_ids[side] = alone[item.responses[side]]
        item.repairs += 1
