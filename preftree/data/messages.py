"""Message objects -> turns: other names for roles, content in parts, and every other key carried along."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from preftree.data.record import Turn
from preftree.errors import did_you_mean

ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model", "chatbot"), "assistant"),
    "observation": "tool",
}
"""Names that data sets give to roles -> the names that chat templates know."""

_USUAL = ("user", "assistant", "system")
_KNOWN = {*_USUAL, "tool", "developer"}
_CONTENT = ("role", "content", "from", "value")
_CALLS = ("tool_calls", "function_call")
# A message with one of these need not have a content.
_SPEAKING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class RowProblem(Exception):
    """A row that cannot be read; the message says why, the caller adds file and row."""


def found(value: object) -> str:
    """What was found instead, for messages: a type, with the value where it is short."""
    if value is None:
        return "nothing (null)"
    return f"{type(value).__name__} ({value!r:.40})" if isinstance(value, bool | int | float) else type(value).__name__


def is_message(value: object) -> TypeGuard[dict[str, Any]]:
    """Is it an object with a role (or ShareGPT's `from`)?"""
    return isinstance(value, dict) and ("role" in value or ("from" in value and "value" in value))


def plain_names(messages: list[Any]) -> list[Any]:
    """ShareGPT's keys and other names for roles, replaced; the same list where nothing was to be replaced."""
    if all(isinstance(message, dict) and message.get("role") in _USUAL for message in messages):
        return messages
    named = [_plainly_named(message) for message in messages]
    return messages if all(new is old for new, old in zip(named, messages, strict=True)) else named


def _plainly_named(message: Any) -> Any:
    if not is_message(message):
        return message
    given = message.get("role", message.get("from"))
    role = plain_role(given)
    if "role" in message and role == given:
        return message
    renamed = {key: value for key, value in message.items() if key not in _CONTENT}
    return {"role": role, "content": message.get("content", message.get("value")), **renamed}


def plain_role(role: Any) -> Any:
    """The name that chat templates know for a role, where this is another name for it."""
    if not isinstance(role, str) or role in _KNOWN:
        return role
    lower = role.strip().lower()
    return ROLES.get(lower, lower if lower in _KNOWN else role)


def turns_of(value: object, column: str) -> tuple[Turn, ...]:
    """Message objects -> turns."""
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else found(value)
        raise RowProblem(f"column `{column}` must be text or a list of messages. Got {got} instead.")
    return tuple(_turn(message, f"column `{column}`, message {number}") for number, message in enumerate(value, 1))


def answer_of(value: object, column: str) -> Turn:
    """An answer that is a text or a list with one assistant message."""
    if isinstance(value, str):
        return Turn("assistant", value)
    turns = turns_of(value, column)
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns)
        raise RowProblem(f"column `{column}` must hold one assistant message. Got messages of {roles} instead.")
    return turns[0]


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise RowProblem(f"{where} must be an object. Got {found(message)} instead.")
    if message.keys() == {"role", "content"} and isinstance(message["content"], str) and message["role"] in _USUAL:
        return Turn(message["role"], message["content"])
    if not isinstance(message.get("role"), str):
        raise _not_text(message, "role", where)
    keys = {str(k): _call_value(v) if k in _CALLS else v for k, v in message.items() if k not in ("role", "content")}
    keys = {name: value for name, value in keys.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, where)
    if content is None and any(keys.get(key) for key in _SPEAKING):
        return Turn(message["role"], "", _as_json({"content": None, **keys}))
    if not isinstance(content, str):
        raise _not_text(message, "content", where)
    return Turn(message["role"], content, _as_json(keys) if keys else "")


def _call_value(value: Any) -> Any:
    """Calls out of their JSON text, each in OpenAI's form; None for none."""
    if isinstance(value, str) and isinstance(parsed := parsed_text(value), list | dict):
        value = parsed
    if isinstance(value, list):
        value = [_wrapped(call) for call in value]
    return value or None


def _wrapped(call: Any) -> Any:
    """A call with its name and arguments under `function`."""
    if not isinstance(call, dict) or "function" in call or "name" not in call:
        return call
    function = {name: value for name, value in call.items() if name in ("name", "arguments")}
    return {"type": "function", **{k: v for k, v in call.items() if k not in function}, "function": function}


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of text parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else found(part)
            raise RowProblem(f"{where}: its content has a part of the type {kind}, and only text can be trained on.")
        texts.append(text)
    return "".join(texts)


def _not_text(message: Mapping[str, Any], key: str, where: str) -> RowProblem:
    hint = did_you_mean(key, map(str, message)) if key not in message else ""
    return RowProblem(f"{where}: `{key}` must be text. Got {found(message.get(key))} instead.{hint}")


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def parsed_text(text: str) -> Any:
    """The value that a text is the JSON or the Python repr of; None for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def json_column(value: Any, column: str, kind: type) -> str:
    """A list or an object (or its JSON text) that goes to the chat template, as JSON text; "" for none."""
    if isinstance(value, str):
        parsed = parsed_text(value) if value.strip() else None
        if parsed is None and value.strip() not in ("", "null", "None"):
            raise RowProblem(f"column `{column}` is text and not JSON; it must hold JSON.")
        value = parsed
    if not value and (value is None or isinstance(value, kind)):
        return ""
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, Mapping) for item in value)):  # type: ignore[attr-defined]
        wanted = "a list of objects" if kind is list else "an object"
        raise RowProblem(f"column `{column}` must hold {wanted}. Got {found(value)} instead.")
    return _as_json(value)
