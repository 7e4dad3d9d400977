"""A preference pair -> the texts that are tokenized: the prompt as inference will see it, and both answers as the
model should then write them. Where the two cannot be reconciled, the reason why the pair is left out.

- A prompt that ends with the assistant's turn is continued, not answered: its answers go on in that turn.
- Every turn of the prompt must be in the rendered prompt, and what an answer says in its rendered text. Templates
  drop roles that they do not know, and cut reasoning out of answers.
- Where the generation prompt opens reasoning (`<think>`), an answer goes on inside it: with what follows its own
  `<think>`, or as the template writes it. An answer that would never close the reasoning is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from preftree.data.chat import Chat, Messages
from preftree.data.reasoning import Opened, behind_reasoning, count_marks, left_open, split_reasoning
from preftree.data.record import PreferencePair, Turn

PROMPT_EMPTY = "the prompt is empty"
PROMPT_REFUSED = "the chat template refuses the conversation"
CHOSEN_EMPTY = "the chosen answer is empty"
REJECTED_EMPTY = "the rejected answer is empty"
IDENTICAL = "chosen and rejected are identical"
IDENTICAL_WRITTEN = "chosen and rejected differ only in what the chat template does not write"
TURN_LOST = "the chat template does not write a turn of the role"
ENDS_WITH_CALL = "the prompt ends with a tool call of the assistant, which no answer can continue"
NOT_CLOSED = "the generation prompt opens reasoning that the answer does not close"
NOT_OPEN = "the answer holds reasoning, which the generation prompt has closed"
REWRITTEN = "the chat template changes or leaves out what the answer says"
NOT_WRITTEN = "the chat template does not write the answer's"

CONTINUED = "prompts end with the assistant's turn, which the answers continue"
EMPTY_WRITTEN = "prompts have an empty system message, which the chat template writes as an empty system turn"
EMPTY_IGNORED = "prompts have an empty system message, which is written like none"
REASONING_KEPT = "pairs have reasoning that the chat template cuts out of answers; it is trained on"
REASONING_INSIDE = "pairs have answers that go on inside the reasoning that the generation prompt opens"

UNWRITTEN = "pairs hold `{}`, which the chat template does not write"
LEFT_OUT = "ranked lists go on without some answers: {}"

# Characters at the end of a prompt in which marks of reasoning are looked for.
_TAIL = 80
_USUAL_ROLES = ("system", "user", "assistant")
_SYNONYMS = {
    "developer": "system",
    **dict.fromkeys(("function", "ipython", "tool_response", "function_response", "tool_result"), "tool"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MARK = "probe-turn-{}-written"


@dataclass(frozen=True, slots=True)
class Rendered:
    """The texts of a pair; `events` are worth counting, `folded` says that the system text is in the first turn.

    The text of a ranked list's answer that cannot be used is empty.
    """

    prompt: str
    responses: tuple[str, ...]
    folded: bool
    events: tuple[str, ...]


class UnusableError(Exception):
    """A pair that cannot be trained on; the message is the reason it is counted under."""


def render(pair: PreferencePair, chat: Chat) -> Rendered:
    """The texts of a pair under a chat template.

    Raises UnusableError.
    """
    if reason := _nothing_to_learn(pair):
        raise UnusableError(reason)
    try:
        return _Rendering(pair, chat).result()
    except TemplateError as error:
        raise UnusableError(f"{PROMPT_REFUSED} ({error})") from error


def _nothing_to_learn(pair: PreferencePair) -> str:
    chosen, rejected, *others = pair.answers
    if not (pair.system or "").strip() and all(turn.is_empty for turn in pair.turns):
        return PROMPT_EMPTY
    if others:  # what is left of a list is seen once it has tokens
        return ""
    if chosen.is_empty:
        return CHOSEN_EMPTY
    if rejected.is_empty:
        return REJECTED_EMPTY
    return IDENTICAL if chosen == rejected else ""


class _Rendering:
    """One pair on its way; `events` collects what is worth counting."""

    def __init__(self, pair: PreferencePair, chat: Chat) -> None:
        self.pair, self.chat = pair, chat
        self.extras = _extras(pair.tools, pair.template_kwargs)
        self.events: dict[str, None] = {}
        self.opening = ""
        turns = pair.turns
        if len(turns) > 1 and turns[-1].role == "assistant" and turns[-1].is_empty:
            turns = turns[:-1]  # it opens the answer, as the generation prompt does
        last = turns[-1]
        self.prefill = last.content if last.role == "assistant" else ""
        if last.role == "assistant" and (not self.prefill.strip() or _has_call(last)):
            raise UnusableError(ENDS_WITH_CALL)
        self.messages = chat.messages(pair.system, turns)

    def result(self) -> Rendered:
        prompt = self._checked_prompt()
        self._tell_of_empty_system(prompt)
        self._tell_of_unwritten(self.messages, self._prompt, prompt)
        self._tell_of_unwritten_tools(prompt)
        self.opening = self._opening(prompt)
        respond = self._usable_response if self.pair.others else self._response
        responses = tuple(respond(prompt, answer) for answer in self.pair.answers)
        folded = self.chat.folds_system and bool(self.pair.system)
        return Rendered(prompt, responses, folded, tuple(self.events))

    # --- the prompt -------------------------------------------------------------------------------

    def _prompt(self, messages: Messages) -> str:
        if self.prefill:
            return self.chat.continued(messages, self.extras)
        return self.chat.prompt(messages, extras=self.extras)

    def _checked_prompt(self) -> str:
        """The prompt with every turn in it; roles under another name where the template knows only that."""
        try:
            prompt = self._prompt(self.messages)
            lost = self._lost_roles(prompt)
        except TemplateError:
            if not self._rename(set(_SYNONYMS)):
                raise
            prompt = self._prompt(self.messages)
            lost = self._lost_roles(prompt)
        if lost and self._rename(lost):
            prompt = self._prompt(self.messages)
            lost = self._lost_roles(prompt)
        if lost:
            raise UnusableError(f"{TURN_LOST} {', '.join(sorted(lost))}")
        if self.prefill:
            self.events[CONTINUED] = None
        return prompt

    def _rename(self, roles: set[str]) -> bool:
        """Give turns of these roles the name that templates commonly know; whether there were any."""
        renamed = False
        for message in self.messages:
            role = message["role"]
            if role in roles and role in _SYNONYMS:
                message["role"] = _SYNONYMS[role]
                self.events[f"prompts have turns of the role {role}, which are written as {_SYNONYMS[role]}"] = None
                renamed = True
        return renamed

    def _lost_roles(self, prompt: str) -> set[str]:
        """The roles of the turns whose text the template does not write."""
        doubtful = [
            place
            for place, message in enumerate(self.messages)
            if isinstance(message.get("content"), str)
            and message["content"].strip()
            and (message["role"] not in _USUAL_ROLES or message["content"].strip() not in prompt)
        ]
        if not doubtful:
            return set()
        # A template may rewrite a text. It writes the turn if another text in its place turns up.
        marked = list(self.messages)
        for place in doubtful:
            marked[place] = {**marked[place], "content": _MARK.format(place)}
        try:
            written = self._prompt(marked)
        except TemplateError:  # it reads something in the text, as JSON perhaps
            return set()
        return {str(self.messages[place]["role"]) for place in doubtful if _MARK.format(place) not in written}

    def _opening(self, prompt: str) -> str:
        """What the assistant's turn has already when the answer begins, as far as marks of reasoning are in it."""
        if self.prefill or not count_marks(prompt[-_TAIL:]):
            return self.prefill
        bare = self.chat.prompt(self.messages, False, self.extras)
        return prompt[len(bare) :] if prompt.startswith(bare) else prompt[-_TAIL:]

    def _tell_of_empty_system(self, prompt: str) -> None:
        if self.pair.system != "":
            return
        there = bool(self.messages) and self.messages[0] == {"role": "system", "content": ""}
        if there and self._prompt(self.messages[1:]) != prompt:
            self.events[EMPTY_WRITTEN] = None
        else:
            self.events[EMPTY_IGNORED] = None

    # --- the answers ------------------------------------------------------------------------------

    def _usable_response(self, prompt: str, answer: Turn) -> str:
        """Of a ranked list, which goes on without an answer that cannot be used."""
        try:
            return self._response(prompt, answer)
        except UnusableError as reason:
            self.events[LEFT_OUT.format(reason)] = None
            return ""

    def _response(self, prompt: str, answer: Turn) -> str:
        """What the model should write behind the prompt."""
        opened = left_open(self.opening)
        said, messages = answer, self.messages
        if self.prefill:
            said, messages = Turn("assistant", self.prefill + answer.content, answer.keys), messages[:-1]
        full = self.chat.conversation(messages, said, self.extras)
        message = self.chat.message(said)
        lost = self._tell_of_unwritten([message], lambda m: self.chat.prompt([*messages, *m], False, self.extras), full)
        if lost and not answer.content.strip() and lost >= message.keys() - {"role", "content"}:
            raise UnusableError(f"{NOT_WRITTEN} {', '.join(sorted(lost))}")
        if lost:
            answer = _without(answer, lost if opened is None else lost.difference(_REASONING))
        written = full[len(prompt) :] if full.startswith(prompt) else None
        if opened is not None:
            self.events[REASONING_INSIDE] = None
        if written is not None and self._sound(written, opened, said.content):
            return self.chat.without_tail(written)
        if opened is not None:
            return self._inside(prompt, full, answer, opened)
        return self._parted(prompt, messages, answer) or self._restored(written, answer)

    def _sound(self, written: str, opened: Opened | None, text: str) -> bool:
        """Does what the template writes behind the prompt hold the text, and any reasoning once?"""
        whole = self.opening + written
        if opened is not None and (count_marks(whole) > max(count_marks(text), 2) or left_open(whole) is not None):
            return False
        if opened is None and 0 < count_marks(text) < count_marks(written):
            return False
        return _holds(whole, text)

    def _inside(self, prompt: str, full: str, answer: Turn, opened: Opened) -> str:
        """An answer behind a prompt that opens reasoning, where the template does not write it that way."""
        text = _with_reasoning(answer, opened.closing)
        if text != answer.content:  # what the template does not write is written here
            for key in _REASONING:
                self.events.pop(UNWRITTEN.format(key), None)
        begun = text.lstrip()
        if begun.startswith(opened.opening):
            text = begun[len(opened.opening) :]
            text = text.lstrip() if prompt[-1:].isspace() else text
        if opened.closing in text:
            return self._alone(text, answer)
        # The template may close it at once, with other white space than the generation prompt has.
        behind = full.removeprefix(prompt.rstrip()).lstrip()
        if full.startswith(prompt.rstrip()) and behind.startswith(opened.closing) and _holds(behind, answer.content):
            return self.chat.without_tail(behind)
        raise UnusableError(NOT_CLOSED)

    def _parted(self, prompt: str, messages: Messages, answer: Turn) -> str:
        """An answer whose reasoning the template writes from a key of its own; "" where it does not."""
        reasoning, rest = split_reasoning(answer.content)
        if not reasoning or self.prefill:
            return ""
        keys = json.loads(answer.keys) if answer.keys else {}
        said = Turn("assistant", rest, json.dumps({**keys, "reasoning_content": reasoning}))
        full = self.chat.conversation(messages, said, self.extras)
        written = full.removeprefix(prompt) if full.startswith(prompt) else ""
        return self.chat.without_tail(written) if self._sound(written, None, answer.content) else ""

    def _restored(self, written: str | None, answer: Turn) -> str:
        """An answer whose text the template changes, or writes behind something else than its generation prompt."""
        text = answer.content
        thinks = bool(count_marks(text)) or any(key in json.loads(answer.keys or "{}") for key in _REASONING)
        if thinks and count_marks(self.opening):
            raise UnusableError(NOT_OPEN)
        if written is not None:
            rest = behind_reasoning(text)
            if rest == text or not _holds(written, rest) or count_marks(written) > count_marks(rest):
                raise UnusableError(REWRITTEN)
            self.events[REASONING_KEPT] = None
        return self._alone(text, answer)

    def _alone(self, text: str, answer: Turn) -> str:
        """A text with the template's tail, where the template does not write the answer as it is wanted."""
        if _has_call(answer):
            raise UnusableError(REWRITTEN)
        return self.chat.without_tail(text + self.chat.tail)

    # --- what the template leaves out -------------------------------------------------------------

    def _tell_of_unwritten(self, messages: Messages, render: Callable[[Messages], str], written: str) -> set[str]:
        """The keys of messages that change nothing in what the template writes; each is counted."""
        lost = set()
        for key in dict.fromkeys(name for message in messages for name in message if name not in ("role", "content")):
            # transformers gives the template all names of reasoning where one is there, so they go together.
            names = _REASONING if key in _REASONING else (key,)
            without = [{name: value for name, value in message.items() if name not in names} for message in messages]
            try:
                if render(without) == written:
                    lost.add(key)
            except TemplateError:
                pass
        for key in lost:
            self.events[UNWRITTEN.format(key)] = None
        return lost

    def _tell_of_unwritten_tools(self, prompt: str) -> None:
        if not self.pair.tools or self.prefill:
            return
        bare = {name: value for name, value in self.extras.items() if name != "tools"}
        if self.chat.prompt(self.messages, extras=bare) == prompt:
            self.events[UNWRITTEN.format("tools")] = None


def _has_call(turn: Turn) -> bool:
    return bool(turn.keys) and any(key in json.loads(turn.keys) for key in ("tool_calls", "function_call"))


def _without(turn: Turn, names: set[str]) -> Turn:
    keys = {key: value for key, value in json.loads(turn.keys).items() if key not in names}
    return Turn(turn.role, turn.content, json.dumps(keys) if keys else "")


def _with_reasoning(answer: Turn, closing: str) -> str:
    """The answer's text, with the reasoning that its message keeps under a key of its own before it."""
    keys = json.loads(answer.keys) if answer.keys else {}
    reasoning = next((keys[key] for key in _REASONING if isinstance(keys.get(key), str)), "")
    if not reasoning.strip() or closing in answer.content:
        return answer.content
    return f"{reasoning.strip()}\n{closing}\n\n{answer.content.lstrip()}"


def _holds(written: str, text: str) -> bool:
    """Is the text in what was written, white space aside?"""
    return text.strip() in written or "".join(text.split()) in "".join(written.split())


@lru_cache(maxsize=256)
def _extras(tools: str, template_kwargs: str) -> dict[str, Any]:
    extras: dict[str, Any] = json.loads(template_kwargs) if template_kwargs else {}
    return extras | ({"tools": json.loads(tools)} if tools else {})
