"""Words on a terminal: texts of the data are shown as they are, never obeyed as markup or as a terminal's commands."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# What prints one line for the user.
Say = Callable[[str], None]

# C0 but tab and newline, DEL, C1; marks that turn the direction of what follows; halves of characters, which no
# encoding can write.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with what a terminal would obey or could not show written out: ESC becomes `\x1b`."""
    return _UNSEEN.sub(lambda found: repr(found.group())[1:-1], text)


def sayer(console: Console) -> Say:
    """Prints lines as they are: no markup, no wrapping, nothing that the terminal would obey."""
    return lambda text: console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


#: Set for commands that are stages of a pipeline, which goes on by itself.
IN_PIPELINE = "PREFTREE_IN_PIPELINE"


def next_steps(say: Say, *commands: str) -> None:
    """The last lines of a command: what to run next. A stage of a pipeline has none."""
    if os.environ.get(IN_PIPELINE):
        return
    for number, command in enumerate(commands):
        say(f"{'' if number else 'next':10} {command}")
