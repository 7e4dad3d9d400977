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

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from preftree.data.chat import Chat
from preftree.data.encoded import IDENTICAL_CUT, EncodedPair, EncodeReport, Lengths, PairFate
from preftree.data.record import PreferencePair
from preftree.data.render import IDENTICAL, IDENTICAL_WRITTEN, Rendered, UnusableError, render
from preftree.data.time_limit import time_limit
from preftree.errors import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BATCH", "IDENTICAL_CUT", "EncodeReport", "EncodedPair", "PairEncoder", "PairFate", "encode_pairs"]

#: Pairs that are tokenized in one call.
BATCH = 256


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
        self.chat = chat = Chat(tokenizer)
        self.lengths = Lengths(max_length, max_prompt_length, truncation_mode, chat.cut_prompt)
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
            return self.lengths.fate(item, shortest=1)
        answers, early_ends = zip(*map(self.chat.ended, item.response_ids), strict=True)
        chosen, rejected, *others = map(tuple, answers)
        pair = item.pair
        whole = EncodedPair(
            tuple(item.prompt_ids), chosen, rejected, pair.row, pair.source, tuple(others), pair.ranks
        )  # fmt: skip
        fate = self.lengths.fate(whole, shortest=2)
        if fate.reason == IDENTICAL and pair.chosen_keys != pair.rejected_keys:
            fate = replace(fate, reason=IDENTICAL_WRITTEN)
        return replace(
            fate,
            repairs=item.repairs,
            early_ends=sum(early_ends),
            folded=item.texts.folded,
            events=item.texts.events,
        )


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
