"""From a command line to settings: one reader for every command, in which nothing is started or changed.

Each flag is read by itself, so that all mistakes of a command line are reported together and not one by one.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from preftree.config import usage
from preftree.config.checks import refuse
from preftree.config.files import ENDINGS, read_settings
from preftree.config.flags import Flag, Kind, ValueProblem, flags_of
from preftree.config.names import Foreign, aliases
from preftree.errors import SettingsError, did_you_mean
from preftree.io.secrets import redacted

T = TypeVar("T")

_HELP = {"help": False, "help_all": True}
#: A flag on the command line: its name, the words behind it, and how it was written.
_Group = tuple[str, list[str], str]


@dataclasses.dataclass
class Parsed:
    """What a command line says.

    Args:
        values: by field name, defaults included.
        given: names of the fields that the command line or its file sets.
        notes: words for the user.
        problems: what it has to be refused for.
    """

    values: dict[str, Any]
    given: set[str] = dataclasses.field(default_factory=set)
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclasses.dataclass(frozen=True)
class Command:
    """How a command is declared: all that its parser and its help need.

    Args:
        name: as in `preftree NAME`.
        summary: one sentence for the head of the help.
        groups: dataclasses whose fields are the flags.
        common: names of the flags that --help lists.
        examples: command lines for the help.
        more_flags: flags that are no fields of `groups`.
        old_flags: name of a flag that is gone -> (what it is called now, or None; why).
        foreign: flags of other tools, each with its answer.
        settings_file: whether the first word may be a .yaml or .json file of flags; not where it is a file of its own.
    """

    name: str
    summary: str
    groups: tuple[type, ...]
    common: tuple[str, ...]
    examples: tuple[str, ...] = ()
    more_flags: Mapping[str, Flag] = dataclasses.field(default_factory=dict)
    old_flags: Mapping[str, tuple[str | None, str]] = dataclasses.field(default_factory=dict)
    foreign: Mapping[str, Foreign] = dataclasses.field(default_factory=dict)
    settings_file: bool = True

    @property
    def group_names(self) -> list[str]:
        return [str(getattr(group, "_argument_group_name", group.__name__)) for group in self.groups]


class FlagParser:
    """Reads the command lines of one command."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.table: dict[str, Flag] = {}
        for group in command.groups:
            self.table |= flags_of(group)
        self.table = {**command.more_flags, **self.table}
        self.aliases = aliases(self.table)
        self._positional = next((flag.name for flag in self.table.values() if flag.positional), None)

    @property
    def flags(self) -> set[str]:
        """Every name that is taken as a flag, in its underscore spelling."""
        no = {f"no_{flag.name}" for flag in self.table.values() if flag.kind is Kind.BOOL}
        return set(self.table) | set(self.aliases) | no | set(_HELP)

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Read `[settings.yaml] --flag value …`; nothing is raised, all problems come back.

        `--help`, `--help-all` and `-h` print the help and exit with 0.
        """
        parsed = Parsed({name: _copied(flag.default) for name, flag in self.table.items()})
        words = list(argv)
        if self._begins_with_settings(words):
            path = Path(words.pop(0))
            for name, values in read_settings(path, self.command.group_names, parsed.problems):
                self._take(name.replace("-", "_"), values, f"{path}: {name}", parsed)
        for name, values, shown in self._split(words, parsed.problems):
            self._take(name, values, shown, parsed)
        return parsed

    def _begins_with_settings(self, words: Sequence[str]) -> bool:
        if not self.command.settings_file or not words or not words[0].endswith(ENDINGS):
            return False
        return not (self._positional and words[0].endswith(".json"))

    def _split(self, words: Sequence[str], problems: list[str]) -> list[_Group]:
        """Cut a command line at its flags."""
        groups: list[_Group] = []
        for word in words:
            if re.match(r"--[A-Za-z]", word):
                flag, equals, value = word.partition("=")
                groups.append((flag[2:].replace("-", "_"), [value] if equals else [], flag))
            elif word == "-h":
                groups.append(("help", [], word))
            elif groups:
                groups[-1][1].append(word)
            elif self._positional:
                groups.append((self._positional, [word], self._positional))
            else:
                problems.append(
                    f"{redacted(word)!r} belongs to no flag; the first word may be a .yaml or .json file, all others"
                    " are flags."
                )
        return self._with_words_behind_flags(groups)

    def _with_words_behind_flags(self, groups: list[_Group]) -> list[_Group]:
        """Words behind the one value of a flag belong to the positional flag, where that takes several."""
        if self._positional is None or self.table[self._positional].kind is not Kind.WORDS:
            return groups
        moved: list[str] = []
        for name, values, _ in groups:
            flag = self.table.get(self.aliases.get(name, name))
            if flag is not None and flag.kind is not Kind.WORDS and len(values) > 1:
                moved += values[1:]
                del values[1:]
        first = next((values for name, values, _ in groups if name == self._positional), [])
        others = [group for group in groups if group[0] != self._positional]
        return [*others, (self._positional, [*first, *moved], self._positional)] if first or moved else others

    def _take(self, name: str, words: list[str], shown: str, parsed: Parsed) -> None:
        """Set one flag in `parsed`, or add what is wrong with it to its problems."""
        if name in _HELP:
            print(usage.text(self, everything=_HELP[name]))
            sys.exit(0)
        name = self._own_name(name, words, shown, parsed)
        flag = self.table.get(name)
        if flag is None and name.startswith("no_") and name[3:] in self.table:
            flag = self.table[name[3:]]
            if flag.kind is not Kind.BOOL or words:
                parsed.problems.append(f"{shown} takes no value and is for flags that are true or false.")
                return
            words = ["false"]
        if flag is None:
            return
        try:
            parsed.values[flag.name] = flag.read(words)
            parsed.given.add(flag.name)
        except ValueProblem as problem:
            hint = ": no such value (--use_auth_token is true or false; --token takes the token itself)"
            text = hint if flag.secret else f" {redacted(str(problem))}"
            parsed.problems.append(f"{shown}{text}{'' if text.endswith('?') else '.'}")

    def _own_name(self, name: str, words: list[str], shown: str, parsed: Parsed) -> str:
        """The field that a name of any age or origin means; '' where it means none, which is noted or a problem."""
        if name in self.table or (name.startswith("no_") and name[3:] in self.table):
            return name
        if name in self.aliases:
            return self.aliases[name]
        if name in self.command.old_flags:
            new, why = self.command.old_flags[name]
            parsed.note(f"--{name}: {why}." if new is None else f"--{name} is now --{new} ({why}).")
            return new or ""
        if (foreign := self.command.foreign.get(name)) is not None:
            if foreign.asks_for_more(words):
                parsed.problems.append(f"{shown} is not supported here: {foreign.reason}.")
            else:
                parsed.note(f"--{name}: ignored, {foreign.reason}.")
            return ""
        near = did_you_mean(name, sorted({*self.table, *self.aliases, *self.command.old_flags, *self.command.foreign}))
        near = re.sub(r"(?<=[ ,])(?=\w+[,?])", "--", near)
        parsed.problems.append(f"{redacted(shown)} is not a setting of preftree {self.command.name}.{near}")
        return ""


def filled(groups: Iterable[type[T]], parsed: Parsed) -> list[T]:
    """Each group of settings (a dataclass) with its values; what it refuses is added to `parsed.problems`."""
    made = []
    for group in groups:
        names = [item.name for item in dataclasses.fields(group) if item.name in parsed.values]  # type: ignore[arg-type]
        try:
            made.append(group(**{name: parsed.values[name] for name in names}))
        except SettingsError as error:
            parsed.problems += error.problems
    return made


def settings_of(parser: FlagParser, group: type[T], argv: Sequence[str]) -> T:
    """The settings that a command line gives, for a command with one group. Raises SettingsError with every problem."""
    parsed = parser.parse(argv)
    found = filled((group,), parsed)
    refuse(parsed.problems)
    return found[0]


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
