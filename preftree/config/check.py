"""What `preftree check` can be told."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse, within
from preftree.config.choices import PAIR_RULES
from preftree.config.parser import Command, FlagParser, filled


@dataclass
class CheckSettings:
    """What is checked, for which lengths and tokenizer, and where the report goes."""

    _argument_group_name: ClassVar[str] = "check"

    dataset_name: str | None = field(default=None, metadata={"positional": True})
    """What to check: a local file (jsonl, json, csv, parquet), a folder of such files, or a hub id."""
    model_name_or_path: str | None = None
    """The model to be trained, or a folder with its tokenizer: for everything that is counted in tokens."""
    model_revision: str = "main"
    """Branch, tag or commit of the model on the hub."""
    cache_dir: str | None = None
    """Where models and data from the hub are kept."""
    use_auth_token: bool = False
    """Use the token that the hub's own login command has stored, for private models and data."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set, where it has several."""
    split: str = "train"
    """Which split to check."""
    streaming: bool = True
    """Read a hub data set row by row without downloading all of it."""
    max_length: int = 1024
    """Longest prompt and answer together, in tokens."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens."""
    pair_rule: str = field(default="best_worst", metadata={"choices": PAIR_RULES})
    """Pairs made of a prompt's ranked answers: best_worst, best_each (best against each other one) or all."""
    min_margin: float = 0.0
    """Make pairs only of answers whose scores differ by more than this."""
    max_rows: int | None = None
    """Read at most this many rows, the first ones."""
    token_sample: int = 4000
    """Pairs to tokenize, drawn at random; 0 tokenizes all, one to two thousand per second."""
    eval_data: str | None = None
    """A folder with the files of ARC, HellaSwag, MMLU or TruthfulQA: look for their questions."""
    near_duplicates: bool = False
    """Look for prompts that are nearly equal (MinHash): about 1 ms and 3 KB per row."""
    show: int = 0
    """Also show this many pairs, the first ones, as they are trained on: their token ids, decoded."""
    json: bool = False
    """Print the report as JSON instead of a table."""
    html: str | None = None
    """Also write the report, with histograms, into this HTML file."""
    fix: str | None = None
    """Write the cleaned data into this file (a folder, for a folder), and a log beside it."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.dataset_name:
            problems.append("name what to check: preftree check PATH, a file, a folder or a hub id.")
        one_of(problems, "pair_rule", self.pair_rule, PAIR_RULES)
        within(problems, "min_margin", self.min_margin, 0)
        within(problems, "max_rows", self.max_rows, 1)
        within(problems, "token_sample", self.token_sample, 0)
        within(problems, "show", self.show, 0)
        if self.show > 0 and not self.model_name_or_path:
            problems.append("--show needs --model_name_or_path: the tokenizer decides what is trained on.")
        within(problems, "max_prompt_length", self.max_prompt_length, 1)
        within(problems, "max_length", self.max_length, 2)
        if self.max_prompt_length >= self.max_length:
            problems.append(
                f"--max_prompt_length must be less than --max_length, or no token is left for an answer. Got"
                f" {self.max_prompt_length} and {self.max_length}."
            )
        if self.fix and self.max_rows:
            problems.append("--fix writes whole files, so it cannot be used with --max_rows: leave one of them out.")
        refuse(problems)


def parse_check_settings(argv: Sequence[str]) -> CheckSettings:
    """Read `PATH --flag value …`; `--help` prints the flags and exits with 0.

    Raises SettingsError with every problem found.
    """
    parsed = parser().parse(argv)
    groups = filled((CheckSettings,), parsed)
    refuse(parsed.problems)
    return groups[0]


COMMAND = Command(
    name="check",
    summary="Find what in preference data would spoil training.",
    groups=(CheckSettings,),
    common=(
        "dataset_name", "model_name_or_path", "max_length", "max_prompt_length", "split", "max_rows", "token_sample",
        "eval_data", "near_duplicates", "pair_rule", "min_margin", "show", "json", "html", "fix",
    ),
    examples=(
        "preftree check pairs.jsonl",
        "preftree check pairs.jsonl --model smollm2 --show 3 --html report.html",
        "preftree check pairs.jsonl --fix cleaned.jsonl",
    ),
)  # fmt: skip


@functools.cache
def parser() -> FlagParser:
    """The parser of `preftree check`."""
    return FlagParser(COMMAND)
