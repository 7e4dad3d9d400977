"""Checks of values that add what they find to a list of problems, so that all are reported at once."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from preftree.config.sizes import size_in_bytes
from preftree.errors import SettingsError, did_you_mean


def one_of(problems: list[str], name: str, value: str, allowed: Collection[str]) -> None:
    """Add a problem unless `value` is one of `allowed`."""
    if value not in allowed:
        near = did_you_mean(str(value), allowed, limit=1)
        problems.append(f"--{name} must be one of {', '.join(allowed)}. Got {value!r} instead.{near}")


def within(
    problems: list[str],
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Add a problem unless low ≤ value ≤ high (`above`, `below`: strictly) and finite; None is always fine."""
    if value is None:
        return
    if not isinstance(value, Real):
        problems.append(f"--{name} must be a number. Got {value!r} instead.")
        return
    number: Any = value  # of any numeric type, and of any size
    fits_low = number > low if above else number >= low
    fits_high = number < high if below or high == float("inf") else number <= high
    if not (fits_low and fits_high):  # written so that NaN does not fit
        text = f"above {low:g}" if above else f"at least {low:g}"
        if high != float("inf"):
            text += f" and {'below' if below else 'at most'} {high:g}"
        elif number == high:
            text += " and finite"
        problems.append(f"--{name} must be {text}. Got {value} instead.")


def memory_size(problems: list[str], name: str, value: str | None) -> None:
    """Add a problem unless `value` is an amount of memory; None is always fine."""
    try:
        _ = None if value is None else size_in_bytes(value)
    except ValueError:
        problems.append(f"--{name} {value}: write a number and a unit, such as 2GB or 1500MiB.")


def json_object(problems: list[str], name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping, or what a JSON object in a string says; adds a problem where the string holds none."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            problems.append(
                f"""--{name} must be a JSON object, such as '{{"key": 1}}', or a dict. Got {value!r} instead."""
            )
            return None
        return found
    return None if value is None else dict(value)


#: What values of a type are called in messages.
_KINDS = {
    bool: "True, False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    NoneType: "None",
    dict: "a dict",
}


def of_declared_types(problems: list[str], settings: object, declared: type) -> None:
    """Add a problem for each field of a dataclass whose value is not of the type that `declared` annotates it with.

    A command line is converted while it is read; a script, or a YAML file that a script reads, may hold anything.
    """
    for name, kind in get_type_hints(declared).items():
        value = getattr(settings, name)
        if not _is_a(value, kind):
            *others, last = _called(kind).split(", ")
            words = f"{', '.join(others)} or {last}" if others else last
            problems.append(f"--{name} must be {words}. Got {value!r} instead.")


def _is_a(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list | tuple) and all(_is_a(each, parts[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if kind in (int, float):  # numpy's numbers as well
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def _called(kind: Any) -> str:
    """The kinds in words, joined by commas."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return ", ".join(_called(part) for part in parts)
    if origin is list:
        return f"a list of {_called(parts[0]).removeprefix('a ')}s"
    return _KINDS[origin or kind]


def refuse(problems: Sequence[str]) -> None:
    """Raise SettingsError with all `problems`, if there are any."""
    if problems:
        raise SettingsError(*problems)
