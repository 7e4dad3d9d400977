"""The command that repeats a run: every setting that is not at its default."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from preftree.config.train import parser


def train_command(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """`preftree train --flag value …` for the settings of a run folder."""
    return " ".join(command_parts(settings))


def command_parts(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The same in parts that belong on one line: the command, then each flag with its values."""
    parts = ["preftree train"]
    for name, value in changed_settings(settings).items():
        values = value if isinstance(value, list) else [value]
        parts.append(shlex.join([f"--{name}", *map(_word, values)]))
    return parts


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def changed_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that differ from their defaults, by flag."""
    table = parser().table
    values = {name: value for group in settings.values() for name, value in group.items()}
    return {
        name: values[name]
        for name, flag in table.items()
        if name in values and values[name] is not None and values[name] != flag.default and not flag.secret
    }
