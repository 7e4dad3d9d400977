"""Rows of a data set, as TRL's users write them, to token ids.

    pretokenized     prompt_ids, chosen_ids, rejected_ids
    standard         prompt, chosen, rejected as texts: put together as they are, EOS at the end, no chat template
    conversational   the same as lists of messages, with `tools` and `chat_template_kwargs` where a row has them
    implicit         chosen and rejected alone: what they have in common is the prompt

The ids are TRL's, but for one thing: where prompt ids are not a prefix of prompt + answer (a token merges across the
boundary, a template writes the prompt another way) TRL cuts the prompt; here the answer is encoded on its own, so that
training sees the prompt that generation will see. Both are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from preftree.data.chat import PLAIN_CHAT_TEMPLATE
from preftree.data.encode import EncodedPair
from preftree.data.render import IDENTICAL
from preftree.errors import DataError

#: Rows that are tokenized in one call.
BATCH = 256
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
NO_PROMPT = "the prompt is empty, so nothing predicts the answers' first tokens"
TOO_LONG = "the prompt alone fills max_length"
NO_ANSWER = "an answer is empty"
VISION = frozenset({"image", "images"})

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]


@dataclass
class RowReport:
    """What became of rows."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    answers_cut: int = 0
    prompts_cut: int = 0
    repaired: int = 0

    def lines(self) -> list[str]:
        """Sentences for people; nothing is said of what did not happen."""
        said = [f"{count} pairs dropped: {reason}" for reason, count in self.dropped.items()]
        counts = {
            "answers were cut to max_length": self.answers_cut,
            "prompts were cut to max_length, keeping their end": self.prompts_cut,
            "answers were encoded on their own, as the prompt's tokens are no prefix of the whole": self.repaired,
        }
        return said + [f"{count} {what}" for what, count in counts.items() if count]


class RowEncoder:
    """Encodes rows batch by batch; `report` counts what it did.

    Args:
        max_length: of prompt and answer together; None for no limit.
        truncation_mode: keep_start cuts answers at their end, keep_end prompts at their start.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation_mode: str) -> None:
        self.tokenizer, self.max_length, self.truncation_mode = tokenizer, max_length, truncation_mode
        self.report = RowReport()

    def encode(self, rows: Iterable[Row]) -> Iterator[EncodedPair]:
        """The pairs that can be trained on, in order; reads no further ahead than one batch.

        Raises:
            DataError: a row that is no preference pair, named by its number.
        """
        numbered = enumerate(rows)
        while batch := list(islice(numbered, BATCH)):
            yield from self._batch(batch)

    def _batch(self, rows: Sequence[tuple[int, Row]]) -> Iterator[EncodedPair]:
        checked = [(number, _checked(number, row)) for number, row in rows]
        rendered = [self._rendered(number, row) for number, row in checked]
        ids = iter(self._tokenize([text for texts in rendered for text in texts]))
        for (number, row), texts in zip(checked, rendered, strict=True):
            self.report.read += 1
            if texts:
                prompt, *whole = [next(ids) for _ in texts]
                prompt = self._without_eos(prompt, whole)
                answers = [
                    self._answer(prompt, full, text.text, texts[0].text, row[side])
                    for full, text, side in zip(whole, texts[1:], SIDES, strict=True)
                ]
            else:
                prompt, *answers = (list(row[name]) for name in ID_COLUMNS)
            if (pair := self._within(number, prompt, *answers)) is not None:
                yield pair

    def _rendered(self, number: int, row: Row) -> tuple[_Text, ...]:
        """Prompt, prompt + chosen, prompt + rejected, as texts; nothing of a pretokenized row."""
        if "prompt_ids" in row:
            return ()
        if isinstance(row["prompt"], str):
            eos = str(self.tokenizer.eos_token or "")
            answers = [text if text.endswith(eos) else text + eos for text in (row["chosen"], row["rejected"])]
            texts = (row["prompt"], *(row["prompt"] + answer for answer in answers))
            return tuple(_Text(text, special=True) for text in texts)
        try:
            return (
                self._render(row, row["prompt"], add_generation_prompt=True),
                self._render(row, row["prompt"] + row["chosen"]),
                self._render(row, row["prompt"] + row["rejected"]),
            )
        except Exception as error:  # Jinja's, a template's own raise_exception, a message of another form
            raise DataError(f"row {number}: the chat template cannot render this conversation: {error}") from error

    def _render(self, row: Row, messages: Messages, **options: Any) -> _Text:
        tools = row.get("tools")
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        options |= row.get("chat_template_kwargs") or {}
        if not self.tokenizer.chat_template:
            options.setdefault("chat_template", PLAIN_CHAT_TEMPLATE)
        return _Text(str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options)), special=False)

    def _tokenize(self, texts: Sequence[_Text]) -> list[list[int]]:
        """Ids of each text, with the tokenizer's own special tokens where no template wrote them."""
        found: dict[_Text, list[int]] = {}
        for special in (True, False):
            wanted = [text for text in dict.fromkeys(texts) if text.special == special]
            if wanted:
                ids = self.tokenizer([each.text for each in wanted], add_special_tokens=special)["input_ids"]
                found.update(zip(wanted, ids, strict=True))
        return [found[text] for text in texts]

    def _without_eos(self, prompt: list[int], whole: Sequence[list[int]]) -> list[int]:
        """A prompt without the EOS that some tokenizers put behind every text."""
        if len(prompt) > 1 and prompt[-1] == self.tokenizer.eos_token_id:
            return prompt[:-1] if all(ids[: len(prompt)] != prompt for ids in whole) else prompt
        return prompt

    def _answer(self, prompt: list[int], whole: list[int], full: str, before: str, answer: str | Messages) -> list[int]:
        """The ids behind the prompt's; those of the answer on its own where the prompt's are no prefix."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        self.report.repaired += 1
        if full.startswith(before):  # a token merges across the boundary
            text = full[len(before) :]
        else:  # the template writes the prompt another way where an answer follows
            own = answer if isinstance(answer, str) else str(answer[0].get("content") or "")
            place = full.rfind(own) if own else -1
            text = full[place if place >= 0 else _shared(full, before) :]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _within(self, number: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair | None:
        """The pair cut to its lengths, None where that leaves nothing to prefer."""
        reason = NO_PROMPT if not prompt else NO_ANSWER if not (chosen and rejected) else ""
        limit = self.max_length
        if not reason and limit is not None:
            if self.truncation_mode == "keep_end":
                room = max(1, limit - max(len(chosen), len(rejected)))
                self.report.prompts_cut += len(prompt) > room
                prompt = prompt[-room:]
            elif len(prompt) >= limit:
                reason = TOO_LONG
            room = max(1, limit - len(prompt))
            self.report.answers_cut += (len(chosen) > room) + (len(rejected) > room)
            chosen, rejected = chosen[:room], rejected[:room]
        if not reason and chosen == rejected:
            reason = IDENTICAL
        if reason:
            self.report.dropped[reason] += 1
            return None
        return EncodedPair(tuple(prompt), tuple(chosen), tuple(rejected), number, "")


@dataclass(frozen=True, slots=True)
class _Text:
    text: str
    special: bool  # does the tokenizer add its special tokens?


SIDES = ("chosen", "rejected")


def _checked(number: int, row: Row) -> Row:
    """The row as token ids, or with prompt and answers all texts or all messages.

    Raises DataError where it is no pair of text.
    """
    if any(row.get(name) is not None for name in VISION):
        raise DataError(
            f"row {number} holds an image. Preference pairs with images are not supported: image features are no token "
            "ids, so a prompt with images cannot be a branch of a token tree. Use TRL for vision-language models."
        )
    if all(row.get(name) is not None for name in ID_COLUMNS):
        return row
    if missing := [side for side in SIDES if row.get(side) is None]:
        raise DataError(
            f"row {number} lacks {' and '.join(f'`{name}`' for name in missing)}; its columns are {', '.join(row)}."
        )
    if row.get("prompt") is None:
        row = {**row, **_split_prompt(row["chosen"], row["rejected"])}
    kinds = {name: _kind(row[name]) for name in ("prompt", *SIDES)}
    if len(set(kinds.values())) > 1 or "" in kinds.values():
        shown = ", ".join(f"`{name}` is {kind or type(row[name]).__name__}" for name, kind in kinds.items())
        raise DataError(f"row {number}: prompt and answers must all be texts or all be lists of messages; {shown}.")
    return row


def is_trl_row(row: Row) -> bool:
    """Is it of one of the layouts above, and so not of another format that the command reads?"""
    if all(name in row for name in ID_COLUMNS):
        return True
    if not all(side in row for side in SIDES) or {"question", "system"} & row.keys():
        return False
    kinds = {_kind(row[name]) for name in ("prompt", *SIDES) if row.get(name) is not None}
    return len(kinds) == 1 and "" not in kinds


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    is_messages = isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    return "a list of messages" if is_messages else ""


def _split_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
    """The beginning that both have in common, and what follows it; a text is not split after a space."""
    shared = _shared(chosen, rejected)
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
