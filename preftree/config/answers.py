"""What `preftree chat` and `preftree samples` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse, within
from preftree.config.choices import DEVICES, DTYPES
from preftree.config.parser import Command, FlagParser, settings_of


@dataclass
class AnswerSettings:
    """Which run answers, where it is computed, and how tokens are drawn."""

    run: str = field(default="", metadata={"positional": True})
    """Folder of a run, of one of its checkpoints, of any PEFT adapter, or of a whole model."""
    model: str | None = None
    """The base model, where another place than the recorded one is meant."""
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    """Precision of weights and computation: auto (what is fast here), float32, bfloat16 or float16."""
    device: str = field(default="auto", metadata={"choices": DEVICES})
    """Where to compute; auto takes a GPU or another accelerator if there is one."""
    use_cpu: bool = False
    """Compute on the CPU even if there is a GPU: --device cpu."""
    system: str | None = None
    """System prompt."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability together."""
    top_k: int = 0
    """Sample from this many tokens at most; 0 for all."""
    seed: int = 0
    """Seed of sampling."""

    def problems(self) -> list[str]:
        """What is wrong with these settings."""
        problems: list[str] = []
        if not self.run:
            problems.append("name the folder of a run, as `preftree train` has written it.")
        one_of(problems, "dtype", self.dtype, DTYPES)
        one_of(problems, "device", self.device, DEVICES)
        within(problems, "max_new_tokens", self.max_new_tokens, 1)
        within(problems, "temperature", self.temperature, 0)
        within(problems, "top_p", self.top_p, 0, 1, above=True)
        within(problems, "top_k", self.top_k, 0)
        if self.use_cpu:
            self.device = "cpu"
        return problems


@dataclass
class ChatSettings(AnswerSettings):
    """Who is talked to, and where votes are kept."""

    _argument_group_name: ClassVar[str] = "chat"

    votes: str | None = None
    """File for votes as preference pairs; by default RUN/run/votes.jsonl."""
    blind: bool = False
    """Shuffle the sides of each answer and name them only after the vote."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if self.votes is not None and not self.votes.endswith(".jsonl"):
            problems.append(f"--votes must be a .jsonl file, so that training can read it. Got {self.votes!r} instead.")
        refuse(problems)


@dataclass
class SamplesSettings(AnswerSettings):
    """Which prompts are answered, and how the answers are shown."""

    _argument_group_name: ClassVar[str] = "samples"

    prompts: str | None = None
    """A .txt file with a prompt per line, or prompts in any format of train; by default the run's held-out pairs."""
    limit: int = 8
    """Prompts to answer, the first ones."""
    batch_size: int = 8
    """Prompts answered at once."""
    html: str | None = None
    """Also write the table into this HTML file."""
    jsonl: str | None = None
    """Also write prompts and answers into this file, one per line."""

    def __post_init__(self) -> None:
        problems = self.problems()
        within(problems, "limit", self.limit, 1)
        within(problems, "batch_size", self.batch_size, 1)
        refuse(problems)


_SAMPLING = ("system", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "model", "dtype", "device", "use_cpu")
CHAT = Command(
    name="chat",
    summary="Talk to a base model and what training made of it, side by side; votes become preference pairs.",
    groups=(ChatSettings,),
    common=("run", "votes", "blind", *_SAMPLING),
    examples=(
        "preftree chat run1",
        'preftree chat run1 --temperature 0.7 --top_p 0.9 --system "Be brief."',
        "preftree chat run1 --blind --votes votes.jsonl",
    ),
)
SAMPLES = Command(
    name="samples",
    summary="Answers of a base model and of what training made of it, side by side, differences marked.",
    groups=(SamplesSettings,),
    common=("run", "prompts", "limit", "html", "jsonl", "batch_size", *_SAMPLING),
    examples=(
        "preftree samples run1",
        "preftree samples run1 --prompts prompts.txt --html samples.html",
        "preftree samples run1 --limit 20 --temperature 0.7 --jsonl samples.jsonl",
    ),
)


@functools.cache
def chat_parser() -> FlagParser:
    """The parser of `preftree chat`."""
    return FlagParser(CHAT)


@functools.cache
def samples_parser() -> FlagParser:
    """The parser of `preftree samples`."""
    return FlagParser(SAMPLES)


def parse_chat(argv: Sequence[str]) -> ChatSettings:
    """Read `RUN --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(chat_parser(), ChatSettings, argv)


def parse_samples(argv: Sequence[str]) -> SamplesSettings:
    """Read `RUN --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(samples_parser(), SamplesSettings, argv)
