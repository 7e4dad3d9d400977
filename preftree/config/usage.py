"""The help of a command: the flags that people use, or all of them in their groups, with defaults."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

from preftree.config.flags import Flag, Kind
from preftree.config.names import SHORT

if TYPE_CHECKING:
    from preftree.config.parser import FlagParser

#: Columns of the flags' names.
_LEFT = 32


def text(parser: FlagParser, everything: bool) -> str:
    """--help, or with `everything` --help-all."""
    command = parser.command
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 100))
    positional = "".join(f" {flag.name.upper()}" for flag in parser.table.values() if flag.positional)
    first = positional or " [settings.yaml]"
    lines = [f"preftree {command.name}{first} [--flag value ...]", "", *textwrap.wrap(command.summary, width), ""]
    if everything:
        groups = dict.fromkeys([*command.group_names, *(flag.group for flag in parser.table.values())])
        for group in groups:
            lines.append(f"{group}:")
            for flag in parser.table.values():
                if flag.group == group:
                    lines += _entry(flag, _others(parser, flag.name), width, brief=False)
            lines.append("")
        lines += textwrap.wrap("Dashes or underscores; a YAML or JSON file has the same names.", width)
        return "\n".join(lines)
    for name in command.common:
        short = [other for other in _others(parser, name) if other in SHORT]
        lines += _entry(parser.table[name], short, width, brief=True)
    lines += ["", "Examples:", *(f"  {example}" for example in command.examples)]
    rest = len(parser.table) - len(command.common)
    if rest:
        lines += ["", f"--help-all lists {rest} more flags, in groups."]
    return "\n".join(lines)


def _entry(flag: Flag, others: list[str], width: int, brief: bool) -> list[str]:
    """A flag with its help beside it."""
    names = ", ".join(f"--{name}" for name in [*(others if brief else ()), flag.name, *(() if brief else others)])
    if flag.positional:
        names = flag.name.upper()
    said = flag.help.rstrip(".")
    if flag.choices and not brief and not all(choice in said for choice in flag.choices):
        said += f" ({', '.join(flag.choices)})"
    default = _default(flag)
    said += f" [{default}]" if default else ""
    right = textwrap.wrap(said, width - _LEFT) or [""]
    if brief:
        right = textwrap.wrap(said, width - _LEFT, max_lines=2, placeholder=f" … [{default}]" if default else " …")
    left = f"  {names}"
    if len(left) > _LEFT - 2:
        return [left, *(" " * _LEFT + line for line in right)]
    return [f"{left:<{_LEFT}}{right[0]}", *(" " * _LEFT + line for line in right[1:])]


def _default(flag: Flag) -> str:
    if flag.default is None or flag.default == [] or flag.default == "":
        return ""
    if flag.kind is Kind.BOOL:
        return str(flag.default).lower()
    if isinstance(flag.default, float):
        return f"{flag.default:g}"
    return " ".join(flag.default) if isinstance(flag.default, list) else str(flag.default)


def _others(parser: FlagParser, name: str) -> list[str]:
    return [alias for alias, own in parser.aliases.items() if own == name]
