"""Rows of a data set, as TRL's users write them, to token ids.

    pretokenized     prompt_ids, chosen_ids, rejected_ids
    standard         prompt, chosen, rejected as texts: put together as they are, EOS at the end, no chat template
    conversational   the same as lists of messages, with `tools` and `chat_template_kwargs` where a row has them
    implicit         chosen and rejected alone: what they have in common is the prompt

Every other format goes through `data.encode.PairEncoder`. These layouts have an encoder of their own because TRL means
something else by them, and a script that changes one import must train on the same token ids: texts get no chat
template, and what a template writes behind an answer's end token is trained on. How pairs are cut, dropped and counted
is one piece of code for both (`data.encoded`).

The ids are TRL's, but for one thing: where prompt ids are not a prefix of prompt + answer (a token merges across the
boundary, a template writes the prompt another way) TRL cuts the prompt; here the answer is encoded on its own, so that
training sees the prompt that generation will see. Both are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from preftree.data.chat import PLAIN_CHAT_TEMPLATE
from preftree.data.encode import BATCH
from preftree.data.encoded import EncodedPair, EncodeReport, Lengths
from preftree.data.messages import RowProblem
from preftree.data.rows import IDS, token_ids
from preftree.errors import DataError

SIDES = ("chosen", "rejected")
VISION = frozenset({"image", "images"})

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]


class RowEncoder:
    """Encodes rows batch by batch; `report` counts what it did.

    Args:
        max_length: of prompt and answer together; None for no limit.
        truncation_mode: keep_start cuts answers at their end, keep_end prompts at their start.
        vocabulary: tokens that the model has an embedding for; None if that is not known.
        name: of the data set, for messages, such as "train_dataset".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        truncation_mode: str,
        vocabulary: int | None = None,
        name: str = "train_dataset",
    ) -> None:
        self.tokenizer, self.vocabulary, self.name = tokenizer, vocabulary, name
        self.lengths = Lengths(max_length, None, truncation_mode, lambda ids, length: ids[-length:])
        self.report = EncodeReport()

    def encode(self, rows: Iterable[Row]) -> Iterator[EncodedPair]:
        """The pairs that can be trained on, in order; reads no further ahead than one batch.

        Raises:
            DataError: a row that is no preference pair, named by its number.
        """
        numbered = enumerate(rows)
        while batch := list(islice(numbered, BATCH)):
            yield from self._batch(batch)

    def _batch(self, rows: Sequence[tuple[int, Row]]) -> Iterator[EncodedPair]:
        checked = [(number, self._checked(number, row)) for number, row in rows]
        rendered = [self._rendered(number, row) for number, row in checked]
        ids = iter(self._tokenize([text for texts in rendered for text in texts]))
        for (number, row), texts in zip(checked, rendered, strict=True):
            repairs = 0
            if texts:
                ids_of_prompt, *whole = [next(ids) for _ in texts]
                ids_of_prompt = self._without_eos(ids_of_prompt, whole)
                repairs = sum(full[: len(ids_of_prompt)] != ids_of_prompt for full in whole)
                prompt = tuple(ids_of_prompt)
                chosen, rejected = (
                    self._answer(ids_of_prompt, full, text.text, texts[0].text, row[side])
                    for full, text, side in zip(whole, texts[1:], SIDES, strict=True)
                )
            else:
                prompt, chosen, rejected = (self._token_ids(number, row, name) for name in IDS)
            pair = EncodedPair(prompt, chosen, rejected, number, self.name)
            fate = replace(self.lengths.fate(pair, shortest=1), repairs=repairs)
            self.report.add(fate)
            if fate.encoded is not None:
                yield fate.encoded

    def _token_ids(self, number: int, row: Row, column: str) -> tuple[int, ...]:
        """Raises DataError for anything but token ids that the model has."""
        try:
            ids = token_ids(row, column)
        except RowProblem as problem:
            raise DataError(f"{self.name} row {number}: {problem}") from problem
        if self.vocabulary is not None and (beyond := max(ids, default=0)) >= self.vocabulary:
            raise DataError(
                f"{self.name} row {number}: column `{column}` holds the token id {beyond}, and the model's vocabulary "
                f"ends at {self.vocabulary - 1}. Were the rows encoded with another tokenizer?"
            )
        return ids

    def _checked(self, number: int, row: Any) -> Row:
        """The row as token ids, or with prompt and answers all texts or all messages.

        Raises DataError where it is no pair of text.
        """
        where = f"{self.name} row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: it must be an object with named columns. Got {type(row).__name__} instead.")
        if any(row.get(name) is not None for name in VISION):
            raise DataError(
                f"{where} holds an image. Preference pairs with images are not supported: image features are no token "
                "ids, so a prompt with images cannot be a branch of a token tree. Use TRL for vision-language models."
            )
        if any(name in row for name in IDS) and not any(row.get(side) is not None for side in SIDES):
            if missing := [name for name in IDS if row.get(name) is None]:
                raise DataError(f"{where} lacks {_and(missing)}: a row of token ids has {_and(IDS)}.")
            return row
        if missing := [side for side in SIDES if row.get(side) is None]:
            raise DataError(f"{where} lacks {_and(missing)}; its columns are {', '.join(row)}.")
        if row.get("prompt") is None:
            row = {**row, **_split_prompt(row["chosen"], row["rejected"])}
        kinds = {name: _kind(row[name]) for name in ("prompt", *SIDES)}
        if len(set(kinds.values())) > 1 or "" in kinds.values():
            shown = ", ".join(f"`{name}` is {kind or _shown(row[name])}" for name, kind in kinds.items())
            raise DataError(f"{where}: prompt and answers must all be texts or all be lists of messages; {shown}.")
        return row

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
            raise DataError(
                f"{self.name} row {number}: the chat template cannot render this conversation: {error}"
            ) from error

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

    def _answer(
        self, prompt: list[int], whole: list[int], full: str, before: str, answer: str | Messages
    ) -> tuple[int, ...]:
        """The ids behind the prompt's; those of the answer on its own where the prompt's are no prefix."""
        if whole[: len(prompt)] == prompt:
            return tuple(whole[len(prompt) :])
        if full.startswith(before):  # a token merges across the boundary
            text = full[len(before) :]
        else:  # the template writes the prompt another way where an answer follows
            own = answer if isinstance(answer, str) else str(answer[0].get("content") or "")
            place = full.rfind(own) if own else -1
            text = full[place if place >= 0 else _shared(full, before) :]
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, slots=True)
class _Text:
    text: str
    special: bool  # does the tokenizer add its special tokens?


def is_trl_row(row: Row) -> bool:
    """Is it of one of the layouts above, and so not of another format that the command reads?"""
    if any(name in row for name in IDS):
        return True
    if not all(side in row for side in SIDES) or {"question", "system"} & row.keys():
        return False
    kinds = {_kind(row[name]) for name in ("prompt", *SIDES) if row.get(name) is not None}
    return len(kinds) == 1 and "" not in kinds


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    is_messages = isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    return "a list of messages" if is_messages and value else ""


def _shown(value: Any) -> str:
    """What a value is that is neither a text nor messages."""
    if isinstance(value, list):
        return "a list of something else" if value else "an empty list"
    return type(value).__name__


def _and(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _split_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
    """The beginning that both have in common, and what follows it; a text is not split after a space."""
    shared = _shared(chosen, rejected)
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
