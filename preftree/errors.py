"""What can go wrong because of what the user gave us, as one tree:

    PreftreeError            anything a user can fix; the command line prints it and exits with 2
    ├── SettingsError        a flag, a YAML key, or two flags that contradict each other
    ├── DataError            a data file or its rows; carries every problem found, not only the first
    ├── ModelError           a model folder, its tokenizer, or LoRA targets that match nothing
    ├── DeviceError          a device or a software stack that is asked for and not there
    ├── RunError             an output folder that holds something else, a checkpoint that does not fit
    └── Stopped              a signal ended training in good order; not a mistake, and exit code 128 + its number

The first three are ValueErrors too, as scripts written for transformers expect.
Every message says what happened, why, and what to do, naming the flag or the row. Bugs of our own are
ordinary exceptions and keep their traceback.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class PreftreeError(Exception):
    """Base of all errors that the user can fix."""


class SettingsError(PreftreeError, ValueError):
    """A setting that cannot be used; `problems` lists all of them."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__(_join(self.problems))


class DataError(PreftreeError, ValueError):
    """A data source that cannot be used; `problems` lists all of them, each with its file and row."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__(_join(self.problems))


class ModelError(PreftreeError, ValueError):
    """A model, tokenizer or adapter that cannot be loaded or does not fit."""


class DeviceError(PreftreeError):
    """A device or software stack that was asked for and is not there."""


class RunError(PreftreeError):
    """An output folder or checkpoint that cannot be used as asked."""


class Stopped(PreftreeError):
    """Training was ended by a signal, after its step was finished and a checkpoint was saved.

    Args:
        signal: its number.
        step: the last step that was finished.
        output_dir: where the checkpoint is.
    """

    def __init__(self, signal: int, step: int, output_dir: str) -> None:
        self.signal, self.step = signal, step
        super().__init__(
            f"stopped after step {step}; checkpoint-{step} in {output_dir} is whole, and the same command goes on, or\n"
            f"           preftree train --resume {shlex.quote(output_dir)}"
        )


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """' Did you mean a, b?' with the names nearest to `name`, or '' when none is near."""
    near = get_close_matches(name, list(known), n=limit, cutoff=0.6)
    return f" Did you mean {', '.join(near)}?" if near else ""


def _join(problems: Sequence[str], shown: int = 20) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = [f"{len(problems)} problems:"]
    lines += [f"  - {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  … and {len(problems) - shown} more")
    return "\n".join(lines)
