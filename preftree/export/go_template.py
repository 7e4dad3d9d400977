"""A chat template in the template language of Ollama (Go's), found by rendering the model's own with marks in it.

The template is taken apart at the marks into what stands before and after each kind of message. What is written is
evaluated again by the few rules that it uses, and compared with the model's own template on other conversations: a
template that does more than put text around messages is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from jinja2 import TemplateError

from preftree.data.chat import Chat, Messages
from preftree.errors import ModelError

_MARKS = {"system": "\u2460system", "user": "\u2461user", "assistant": "\u2462assistant", "again": "\u2463again"}
_ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_PROBES: Sequence[Sequence[tuple[str, str]]] = (
    [("user", "Why is the sky blue?")],
    [("system", "Be brief."), ("user", "Hello")],
    [("user", "One"), ("assistant", "Two"), ("user", "Three")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
)


@dataclass(frozen=True)
class Around:
    """What a template writes around messages: (before, after) by role, at the start without a system message, and to
    open the answer."""

    by_role: Mapping[str, tuple[str, str]]
    start: str
    answer: str

    def text(self) -> str:
        """The template in Go's language; every literal is an action, so that no white space is trimmed."""
        branches: list[str] = []
        for role, (before, after) in self.by_role.items():
            word = "else if" if branches else "if"
            branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}')
        start = f"{{{{ if not .System }}}}{_literal(self.start)}{{{{ end }}}}" if self.start else ""
        return f"{start}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{_literal(self.answer)}"


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""


def go_template(chat: Chat) -> str:
    """The template of `chat` in Go's language, without a BOS, which Ollama adds by itself.

    Raises:
        ModelError: the template does more than put text around messages.
    """
    written = _taken_apart(chat).text()
    for probe in _PROBES:
        messages: Messages = [{"role": role, "content": content} for role, content in probe]
        if probe[0][0] == "system" and chat.folds_system:
            continue
        expected, found = _without_bos(chat, chat.prompt(messages)), evaluate(written, messages)
        if expected != found:
            at = len(commonprefix([expected, found]))  # noqa: RUF071 -- texts, character by character
            raise ModelError(
                "the chat template does more than put text around messages, so it cannot be written for Ollama: "
                f"{expected[at : at + 40]!r} became {found[at : at + 40]!r}. Write the Modelfile's TEMPLATE by hand."
            )
    return written


def _taken_apart(chat: Chat) -> Around:
    turns: Messages = [{"role": role, "content": _MARKS[role]} for role in ("user", "assistant")]
    turns.append({"role": "user", "content": _MARKS["again"]})
    try:
        start, between, back, end = _split(chat, turns, ("user", "assistant", "again"))
        system: tuple[str, str] | None = None
        if not chat.folds_system:
            with_system = [{"role": "system", "content": _MARKS["system"]}, *turns]
            before, after, *_ = _split(chat, with_system, ("system", "user", "assistant", "again"))
            system = (before, after)
    except (TemplateError, ValueError) as problem:
        raise ModelError(f"the chat template cannot be taken apart for Ollama: {problem}") from problem
    user = _common_end([start, back, *([system[1]] if system else [])])
    after_user = commonprefix([between, end])  # noqa: RUF071
    around = {"user": (user, after_user), "assistant": (between.removeprefix(after_user), back.removesuffix(user))}
    if system is not None:
        around["system"] = (system[0], system[1].removesuffix(user))
    return Around(around, start.removesuffix(user), end.removeprefix(after_user))


def _split(chat: Chat, messages: Messages, marks: Sequence[str]) -> list[str]:
    """The rendered messages cut at their marks, which must stand in them once and in order."""
    text, parts = _without_bos(chat, chat.prompt(messages)), []
    for mark in marks:
        before, found, text = text.partition(_MARKS[mark])
        if not found:
            raise ValueError(f"it does not render the {mark} message where it stands")
        parts.append(before)
    return [*parts, text]


def _without_bos(chat: Chat, text: str) -> str:
    bos = chat.tokenizer.bos_token
    return text.removeprefix(bos) if isinstance(bos, str) else text


def _common_end(texts: Sequence[str]) -> str:
    return commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071


def evaluate(template: str, messages: Messages) -> str:
    """What a template of `Around.text` makes of messages, by Go's rules for the actions that it uses."""
    pieces = _ACTION.split(template)
    if any(pieces[::2]):
        raise ValueError("text outside of actions")
    start, loop, end = _parts(pieces[1::2])
    system = any(message["role"] == "system" for message in messages)
    out = [] if system else [_string(action) for action in start]
    for message in messages:
        out += [message["content"] if action == ".Content" else _string(action) for action in loop[message["role"]]]
    return "".join([*out, *(_string(action) for action in end)])


def _parts(actions: Sequence[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """The actions at the start, by role inside the loop, and at the end."""
    rest = list(actions)
    start: list[str] = []
    if rest and rest[0] == "if not .System":
        place = rest.index("end")
        start, rest = rest[1:place], rest[place + 1 :]
    if rest.pop(0) != "range .Messages":
        raise ValueError("no loop over messages")
    loop: dict[str, list[str]] = {}
    role = ""
    while rest:
        action = rest.pop(0)
        if found := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', action):
            role = found[1]
            loop[role] = []
        elif action == "end":
            break
        else:
            loop[role].append(action)
    if rest.pop(0) != "end":
        raise ValueError("the loop does not end")
    return start, loop, rest


def _string(action: str) -> str:
    return str(json.loads(action))
