"""A flag: how it is declared, and how the words behind it become a value.

Every flag of ours is a dataclass field, and its help text is the docstring below that field.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from preftree.errors import did_you_mean

_TRUE, _FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")


class _ChosenLater:
    """The default of a field whose value transformers computes."""

    def __repr__(self) -> str:
        return "chosen by transformers"


CHOSEN_LATER = _ChosenLater()


class Kind(enum.Enum):
    """What a flag takes, in words for its help."""

    BOOL = "true or false"
    INT = "a whole number"
    FLOAT = "a number"
    TEXT = "a value"
    WORDS = "one or more values"
    TEXT_OR_WORDS = "one or several values"
    NUMBERS = "one or more numbers"
    TEXT_OR_TRUE = "a value or nothing"


_NUMERIC = (Kind.INT, Kind.FLOAT)


class ValueProblem(Exception):
    """The words behind a flag are not a value of its kind; the text says why."""


@dataclass(frozen=True)
class Flag:
    """One flag of a command, under the name of its field.

    Args:
        group: the heading under which --help-all lists it.
        choices: all values that it takes; empty where any value of its kind will do.
        positional: words in front of the first flag are its values.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] = ()
    positional: bool = False

    def __post_init__(self) -> None:
        if self.kind is Kind.FLOAT and isinstance(self.default, int):
            object.__setattr__(self, "default", float(self.default))  # as it is read from a file

    @property
    def secret(self) -> bool:
        """Its value is never repeated, not even in a message about a mistake."""
        return self.name.endswith("token")

    def read(self, words: Sequence[str]) -> Any:
        """The value that `words` spell. Raises ValueProblem where they spell none."""
        if self.kind is Kind.WORDS or (self.kind is Kind.TEXT_OR_WORDS and len(words) > 1):
            for word in words:
                self._check_choice(word)
            if words:
                return list(words)
        if self.kind is Kind.NUMBERS and words:
            return [_float(word) for word in words]
        if not words and self.kind in (Kind.BOOL, Kind.TEXT_OR_TRUE):
            return True
        if not words:
            raise ValueProblem(f"expects {self.kind.value}")
        if len(words) > 1:
            several = " (preftree sweep trains with several values)" if self.kind in _NUMERIC else ""
            raise ValueProblem(f"takes one value; {' '.join(words[1:])!r} is left over{several}")
        return self._read_one(words[0])

    def _read_one(self, word: str) -> Any:
        if self.kind is Kind.BOOL:
            if word.lower() not in _TRUE + _FALSE:
                raise ValueProblem(f"must be true or false. Got {word!r} instead")
            return word.lower() in _TRUE
        if self.kind in (Kind.INT, Kind.FLOAT):
            return _int(word) if self.kind is Kind.INT else _float(word)
        self._check_choice(word)
        return word

    def _check_choice(self, word: str) -> None:
        if self.choices and word not in self.choices:
            near = did_you_mean(word, self.choices, limit=1)
            raise ValueProblem(f"must be one of {', '.join(self.choices)}. Got {word!r} instead{near and '.' + near}")


def flags_of(cls: type) -> dict[str, Flag]:
    """The flags that the fields of a dataclass declare, by name.

    `metadata` of a field may hold the `choices` of its flag, that it may stand alone (`bare`), that it is `positional`,
    or that there is `no_flag`.
    """
    docs, hints = _field_docs(cls), typing.get_type_hints(cls)
    group = str(getattr(cls, "_argument_group_name", cls.__name__))
    flags = {}
    for field in dataclasses.fields(cls):
        if not field.init or field.metadata.get("no_flag"):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        flags[field.name] = Flag(
            name=field.name,
            kind=Kind.TEXT_OR_TRUE if field.metadata.get("bare") else _kind(hints[field.name]),
            default=default,
            help=docs[field.name],
            group=group,
            choices=tuple(field.metadata.get("choices", ())),
            positional=bool(field.metadata.get("positional")),
        )
    return flags


@cache
def _field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of `cls` and of the dataclasses it inherits from, as one line each."""
    docs: dict[str, str] = {}
    for each in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, below in zip(tree.body, tree.body[1:], strict=False):
            named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[statement.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return docs


def _kind(hint: Any) -> Kind:
    """The kind of a field's type; None in a union says only that there is a default."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [_kind(part) for part in typing.get_args(hint) if part is not types.NoneType]
        return Kind.TEXT_OR_WORDS if set(kinds) == {Kind.TEXT, Kind.WORDS} else kinds[0]
    if typing.get_origin(hint) is list:
        return Kind.NUMBERS if typing.get_args(hint) == (float,) else Kind.WORDS
    return {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT, str: Kind.TEXT}[hint]


def _int(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueProblem(f"must be {Kind.INT.value}. Got {word!r} instead") from None


def _float(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueProblem(f"must be {Kind.FLOAT.value}. Got {word!r} instead") from None
