"""Prompts to answer: from a file of lines, of rows that hold a prompt alone, or from preference data in any format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftree.data.record import Turn
from preftree.data.sources import Source, load_pairs
from preftree.errors import DataError

#: Columns of a row that hold a prompt alone, the first that is there.
_COLUMNS = ("prompt", "question", "instruction", "messages")


@dataclass(frozen=True)
class AskedPrompt:
    """A conversation up to the answer, and how it is shown."""

    system: str | None
    turns: tuple[Turn, ...]

    @property
    def shown(self) -> str:
        """The last turn, which is what is answered."""
        return self.turns[-1].content


def read_prompts(file: str, limit: int | None) -> list[AskedPrompt]:
    """The prompts of a file.

    Args:
        file: .txt with a prompt per line; .jsonl whose rows have `prompt`, `question`, `instruction` or `messages`; or
            preference pairs in any format.

    Raises:
        DataError: it cannot be read, or holds no prompt.
    """
    path = Path(file)
    if path.is_dir() or not path.exists():
        return prompts_of_pairs(Source(file), limit)
    if path.suffix == ".txt":
        lines = _text(path).splitlines()
        found = [AskedPrompt(None, (Turn("user", line.strip()),)) for line in lines if line.strip()]
    elif path.suffix == ".jsonl" and (rows := _prompt_rows(path)):
        found = [_of_row(row, f"{file}:{number}") for number, row in enumerate(rows[:limit], start=1)]
    else:
        return prompts_of_pairs(Source(file), limit)
    if not found:
        raise DataError(f"{file}: there is no prompt in it. Write one per line.")
    return found[:limit]


def prompts_of_pairs(source: Source, limit: int | None) -> list[AskedPrompt]:
    """The prompts of preference data, each once."""
    seen: dict[str, AskedPrompt] = {}
    for pair in load_pairs(source, limit=None if limit is None else 4 * limit):
        seen.setdefault(repr(pair.prompt_parts), AskedPrompt(pair.system, pair.turns))
    return list(seen.values())[:limit]


def _prompt_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts; none where its rows hold answers, or something else."""
    try:
        rows = [json.loads(line) for line in _text(path).splitlines() if line.strip()]
    except ValueError:
        return []  # the reader of pairs says what is wrong where
    plain = all(isinstance(row, dict) and any(c in row for c in _COLUMNS) and "chosen" not in row for row in rows)
    return rows if plain and not any("completions" in row or "label" in row for row in rows) else []


def _of_row(row: dict[str, Any], place: str) -> AskedPrompt:
    value = next(row[name] for name in _COLUMNS if name in row)
    if isinstance(value, str):
        return AskedPrompt(row.get("system") or None, (Turn("user", value),))
    try:
        turns = tuple(Turn(str(turn["role"]), str(turn["content"])) for turn in value)
    except (TypeError, KeyError):
        raise DataError(f"{place}: a prompt is a text, or messages with role and content.") from None
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    system = turns[0].content if turns and turns[0].role == "system" else None
    turns = turns[1:] if system is not None else turns
    if not turns:
        raise DataError(f"{place}: there is no user's turn to answer.")
    return AskedPrompt(system, turns)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"{path} cannot be read: {getattr(problem, 'strerror', None) or 'it is not UTF-8 text'}."
        ) from None
