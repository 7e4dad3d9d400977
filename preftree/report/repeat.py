"""The command that repeats a run: every setting that is not at its default."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from preftree.config.train import parser


def train_command(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """`preftree train --flag value …` for the settings of a run folder."""
    words = ["preftree", "train"]
    for name, value in changed_settings(settings).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
    return shlex.join(words)


def changed_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that differ from their defaults, by flag."""
    table = parser().table
    values = {name: value for group in settings.values() for name, value in group.items()}
    return {
        name: values[name]
        for name, flag in table.items()
        if name in values and values[name] is not None and values[name] != flag.default and not flag.secret
    }
