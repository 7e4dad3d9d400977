"""Rows as data sets have them -> rows as the formats read them, whatever the format.

Messages stored as text are parsed, other names for roles are replaced, a dialogue in a prompt becomes its turns,
`input` and `history` beside an instruction join it, and answers that repeat their prompt are cut to what follows
it. Each is noted, so that it can be counted and told. To add a step: a function of a row and a line in `STEPS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from preftree.data.dialogue import dialogue_turns, is_dialogue, split_preamble, without_heading
from preftree.data.files import Row
from preftree.data.messages import RowProblem, found, is_message, parsed_text, plain_names

Draft = dict[str, Any]

PROMPTS = ("question", "instruction", "prompt")
ANSWERS = ("chosen", "rejected", "completion")
RANKED = ("completions", "answers", "responses")
TEXT_KEYS = ("response", "text", "answer", "content", "completion")
"""The keys under which a ranked answer may hold its text."""

PARSED = "messages stored as text were parsed"
RENAMED = "other names for roles and keys (human, gpt, from, value, …) were read as those of chat templates"
SPLIT = 'a dialogue ("Human: … Assistant: …") was split into its turns'
JOINED = "`input` or `history` was made part of the prompt"
CUT = "answers that repeated their prompt were cut to what follows it"

# JSON, JSON within JSON, Python's repr of a list and numpy's of an array.
_OBJECTS = re.compile(r"""\s*(?:array\(|"|')?\s*(?:\[\s*)*\{\s*\\*['\"](?P<key>\w+)\\*['\"]\s*:""")
_KEYS = {"role", "content", "from", "value", "messages", "tool_calls", "name"}
_ARRAY = re.compile(r"\s*array\((.*?),?\s*dtype=\w+\)\s*", re.DOTALL)
_LISTS = (*RANKED, "scores", "ranks", "history")
# A prompt of fewer words may well begin an answer by chance ("Hi": "Hi! How can I help?").
_FEWEST_WORDS = 3


class Normalizer:
    """What the first rows of a table say about all of them, and a row in its plain form."""

    def __init__(self, head: Sequence[Row]) -> None:
        names = dict.fromkeys(name for row in head for name in row)
        self.as_text = [name for name in names if _holds_messages_as_text([row.get(name) for row in head])]
        self.cuts: set[str] = set()
        told = [repeats for row in head if (repeats := self._repeats(row)) is not None]
        columns = dict.fromkeys(name for repeats in told for name in repeats)
        self.cuts = {name for name in columns if 2 * sum(repeats.get(name, False) for repeats in told) >= len(told)}

    def __call__(self, row: Row) -> tuple[Row, tuple[str, ...]]:
        """The row in its plain form, and notes on what that changed.

        Raises RowProblem.
        """
        draft = dict(row)
        if images := next((name for name in ("images", "image") if draft.get(name)), None):
            raise RowProblem(f"column `{images}` holds images, and only text can be trained on.")
        notes = [note for note, step in STEPS.items() if step(self, draft)]
        return draft, tuple(notes)

    def _repeats(self, row: Row) -> dict[str, bool] | None:
        """Of which columns do the answers begin with the prompt? None where that could be chance, or cannot be told."""
        try:
            draft = dict(self(row)[0])
        except RowProblem:
            return None
        prompt = _prompt_of(draft)
        if len(prompt.text.split()) < _FEWEST_WORDS and not prompt.begun:
            return None
        return {name: all(map(prompt.repeated_by, texts)) for name, texts in _answer_texts(draft).items()} or None


# --- the steps: each changes a draft in place and says whether it did ------------------------------


def parse(normalizer: Normalizer, row: Draft) -> bool:
    """Messages, and lists of ranked answers, that are stored as JSON or as Python's repr of them."""
    changed = False
    for name in normalizer.as_text:
        value = row.get(name)
        if isinstance(value, str) and _looks_like_messages(value):
            parsed = _parsed_messages(value)
            if parsed is None:
                raise RowProblem(
                    f"column `{name}` holds messages as text, which is neither JSON nor a Python literal. Store JSON."
                )
            row[name] = [parsed] if is_message(parsed) else parsed
            changed = True
    for name in _LISTS:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip().startswith("[") and isinstance(parsed_text(value), list):
            row[name] = parsed_text(value)
            changed = True
    return changed


def rename(_: Normalizer, row: Draft) -> bool:
    """ShareGPT's names and the like; also in the messages of a service's `input`, and for a message without a list."""
    changed = False
    for name, value in row.items():
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            plain: Any = plain_names(value["messages"])
            changed = changed or plain is not value["messages"]
            row[name] = {**value, "messages": plain}
        elif isinstance(value, list) or is_message(value):
            messages = [value] if isinstance(value, dict) else value
            plain = plain_names(messages)
            changed = changed or plain is not messages
            row[name] = plain
    return changed


def split_dialogues(_: Normalizer, row: Draft) -> bool:
    """A dialogue in the prompt, and answers that are whole dialogues or begin with a heading."""
    changed = False
    for column in PROMPTS:
        before, whole = _before_and_text(row.get(column))
        preamble, text = ("", whole) if before else split_preamble(whole)
        if not is_dialogue(text):
            changed = _split_answers(row, text) or changed
            continue
        turns = [{"role": turn.role, "content": turn.content} for turn in dialogue_turns(text, column)]
        system = [{"role": "system", "content": preamble}] if preamble else []
        row[column] = [*before, *system, *turns]
        _change_answers(row, partial(_behind, whole=whole.strip(), prompt=turns))
        changed = True
    return changed


def join_input(_: Normalizer, row: Draft) -> bool:
    """The alpaca form: `input` behind the instruction, `history` (pairs of question and answer) before it."""
    if "preferred_output" in row:  # where `input` is the prompt
        return False
    columns = [name for name in PROMPTS if name in row]
    given, history = row.get("input"), row.get("history")
    if len(columns) != 1 or not (given or (history and columns == ["instruction"])):
        return False  # beside an instruction, a prompt holds them already
    column = columns[0]
    prompt = row[column]
    if given and not isinstance(given, str):
        raise RowProblem(f"column `input` beside `{column}` must be text. Got {found(given)} instead.")
    if given and given.strip() not in _prompt_of(row).text:
        if not isinstance(prompt, str):
            raise RowProblem(f"column `input` stands beside messages in `{column}`: put its text into them.")
        row[column] = f"{prompt}\n\n{given}" if prompt.strip() else given
    if history and column == "instruction":
        row[column] = [*_history(history), {"role": "user", "content": row[column]}]
    return row[column] is not prompt


def cut_repeats(normalizer: Normalizer, row: Draft) -> bool:
    """Answers that begin with their prompt, in columns where that is how most rows of the table are."""
    if not normalizer.cuts:
        return False
    prompt, texts = _prompt_of(row), _answer_texts(row)
    cuts = {name for name in normalizer.cuts & texts.keys() if all(map(prompt.repeated_by, texts[name]))}
    _change_answers(row, lambda text, name: prompt.behind(text) if name in cuts else text)
    return bool(cuts)


STEPS: dict[str, Callable[[Normalizer, Draft], bool]] = {
    PARSED: parse,
    RENAMED: rename,
    SPLIT: split_dialogues,
    JOINED: join_input,
    CUT: cut_repeats,
}
"""What to say of a row -> the step that changes it, in the order in which they are taken."""


# --- parts of the steps ---------------------------------------------------------------------------


def _holds_messages_as_text(values: Sequence[Any]) -> bool:
    """Are at least half of a column's texts messages? A single one may be an answer that shows such JSON."""
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    return 2 * sum(map(_looks_like_messages, texts)) >= len(texts) > 0


def _looks_like_messages(text: str) -> bool:
    """Does it begin as messages do, or is it a list of them that begins with some other key?"""
    found = _OBJECTS.match(text)
    return found is not None and (found["key"] in _KEYS or _parsed_messages(text) is not None)


def _parsed_messages(text: str) -> Any:
    """The messages (or an object around them) in a text; None for any other text, and for damaged ones."""
    inner = _ARRAY.fullmatch(text)
    parsed = parsed_text(inner[1] if inner else text)
    if isinstance(parsed, str):  # JSON within JSON
        parsed = parsed_text(parsed)
    listed = parsed if isinstance(parsed, list) else [parsed]
    known = all(is_message(each) or (isinstance(each, dict) and "messages" in each) for each in listed)
    return parsed if listed and known else None


def _split_answers(row: Draft, prompt: str) -> bool:
    """Answers that are whole dialogues, whose last question is the prompt, as conversations."""
    answers = {name: row[name] for name in ("chosen", "rejected") if isinstance(row.get(name), str)}
    if len(answers) < 2 or not prompt.strip() or not all(map(is_dialogue, answers.values())):
        return False
    split = {name: dialogue_turns(text, name) for name, text in answers.items()}
    if any(len(turns) < 2 or turns[-2].content != prompt.strip() for turns in split.values()):
        return False
    for name, turns in split.items():
        row[name] = [{"role": turn.role, "content": turn.content} for turn in turns]
    return True


def _behind(answer: str, name: str, whole: str, prompt: list[Draft]) -> str:
    """The answer behind a prompt that was a dialogue: without the dialogue in it, and without its heading."""
    if answer.strip().startswith(whole) and answer.strip() != whole:
        return without_heading(answer.strip().removeprefix(whole))
    if not is_dialogue(answer) or without_heading(answer) != answer.strip():
        return without_heading(answer)
    turns = dialogue_turns(answer, name)
    if [(turn.role, turn.content) for turn in turns[:-1]] != [(m["role"], m["content"]) for m in prompt]:
        raise RowProblem(f"column `{name}` is a dialogue that does not go on from the one in the prompt.")
    return turns[-1].content


def _history(history: Any) -> list[Draft]:
    messages = []
    for exchange in history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(said, str) for said in exchange):
            raise RowProblem("column `history` must be a list of pairs of texts, each a question and its answer.")
        messages += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return messages


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What an answer may repeat: the prompt's last text, perhaps with the system text before it.

    Args:
        begun: the text is the beginning of the answer itself (the assistant's turn), which goes on right behind it.
    """

    system: str
    text: str
    begun: bool

    def repeated_by(self, answer: str) -> bool:
        """Does an answer begin with the prompt and go on?"""
        return bool(self.behind(answer))

    def behind(self, answer: str) -> str:
        """What follows the prompt in an answer that begins with it; "" for any other answer."""
        whole = answer.strip()
        if self.system and whole.startswith(self.system):
            whole = whole.removeprefix(self.system).lstrip()
        if not self.text or not whole.startswith(self.text):
            return ""
        rest = whole.removeprefix(self.text)
        within_a_word = rest[:1].isalnum() and self.text[-1].isalnum()
        return "" if within_a_word or not rest.strip() else rest if self.begun else rest.strip()


def _prompt_of(row: Row) -> _Prompt:
    """The prompt of a row as its answers may repeat it."""
    value = next((row[name] for name in PROMPTS if name in row), None)
    system, begun = next((row[name] for name in ("system", "system_prompt") if row.get(name)), ""), False
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        begun = value[-1].get("role") == "assistant"
        value = value[-1].get("content")
    text = value if isinstance(value, str) else ""
    return _Prompt(system.strip() if isinstance(system, str) else "", text.strip(), begun)


def _answer_texts(row: Row) -> dict[str, list[str]]:
    """The texts of all answers by column; none at all where one is no text."""
    columns = {name: [row[name]] for name in ANSWERS if name in row}
    columns |= {name: row[name] for name in RANKED if isinstance(row.get(name), list)}
    texts = {name: [_text(value) for value in values] for name, values in columns.items() if values}
    if any(text is None for values in texts.values() for text in values):
        return {}
    return {name: [text for text in values if text is not None] for name, values in texts.items()}


def _text(value: Any) -> str | None:
    """The text of an answer: itself, a single message's content, or what stands under one of `TEXT_KEYS`."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = next((value[key] for key in TEXT_KEYS if key in value), None)
    return value if isinstance(value, str) else None


def _change_answers(row: Draft, change: Callable[[str, str], str]) -> None:
    """Change the text of every answer; `change` is given the text and the name of its column."""
    for name in ANSWERS:
        if name in row:
            row[name] = _changed_text(row[name], name, change)
    for name in RANKED:
        if isinstance(row.get(name), list):
            row[name] = [_changed_text(answer, name, change) for answer in row[name]]


def _changed_text(value: Any, name: str, change: Callable[[str, str], str]) -> Any:
    if _text(value) is None:
        return value
    if isinstance(value, str):
        return change(value, name)
    if isinstance(value, list):
        return [_changed_text(value[0], name, change)]
    key = next(key for key in TEXT_KEYS if key in value)
    return {**value, key: change(value[key], name)}


def _before_and_text(prompt: Any) -> tuple[list[Any], str]:
    """The messages before a prompt's only user text, and that text; "" for any other prompt."""
    if isinstance(prompt, str):
        return [], prompt
    if isinstance(prompt, list) and prompt and all(map(is_message, prompt)):
        *before, last = prompt
        roles = [message["role"] for message in before]
        if last["role"] == "user" and isinstance(last.get("content"), str) and set(roles) <= {"system"}:
            return before, last["content"]
    return [], ""
