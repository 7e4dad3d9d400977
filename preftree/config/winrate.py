"""What `preftree winrate` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse, within
from preftree.config.choices import DEVICES, DTYPES
from preftree.config.parser import Command, FlagParser, filled
from preftree.config.prepare import ServerSettings


@dataclass
class WinrateSettings:
    """Which models answer which prompts, and who judges."""

    _argument_group_name: ClassVar[str] = "winrate"

    models: list[str] = field(default_factory=list, metadata={"positional": True})
    """Two of: the folder of a run, a model folder, a hub id, smollm2."""
    prompts: str = ""
    """A .txt file with a prompt per line, .jsonl rows with `prompt`, or preference pairs."""
    judge: str = ""
    """Address of an OpenAI-compatible server, as http://localhost:8000/v1, or a model: a folder, hub id or smollm2."""
    judge_model: str | None = None
    """Name of the judging model on the server."""
    out: str | None = None
    """Folder for answers, verdicts and results."""
    limit: int | None = None
    """Prompts at most, the first ones."""
    system: str | None = None
    """System prompt for both models, in place of the prompts' own."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature of the answers; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability together."""
    seed: int = 0
    """Seed of sampling."""
    batch_size: int = 8
    """Prompts answered at once."""
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    """Precision of weights and computation: auto (what is fast here), float32, bfloat16 or float16."""
    device: str = field(default="auto", metadata={"choices": DEVICES})
    """Where to compute; auto takes a GPU or another accelerator if there is one."""
    use_cpu: bool = False
    """Compute on the CPU even if there is a GPU: --device cpu."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if len(self.models) != 2:
            problems.append("name two models: preftree winrate A B --prompts FILE --judge URL|MODEL")
        if not self.prompts:
            problems.append("--prompts is missing: name a file of prompts that neither model was trained on.")
        if not self.judge:
            problems.append("--judge is missing: name the address of a server, or a model.")
        if self.judge_is_server and not self.judge_model:
            problems.append("--judge_model is missing: name the model that the server is to judge with.")
        if self.judge_model and not self.judge_is_server:
            problems.append("--judge_model is for a --judge that is an address; a local judge is named by --judge.")
        one_of(problems, "dtype", self.dtype, DTYPES)
        one_of(problems, "device", self.device, DEVICES)
        for name in ("limit", "max_new_tokens", "batch_size"):
            within(problems, name, getattr(self, name), 1)
        within(problems, "temperature", self.temperature, 0)
        within(problems, "top_p", self.top_p, 0, 1, above=True)
        if self.use_cpu:
            self.device = "cpu"
        refuse(problems)

    @property
    def judge_is_server(self) -> bool:
        """Is the judge an address?"""
        return "://" in self.judge


@dataclass
class JudgeServerSettings(ServerSettings):
    """How a judging server is asked."""

    _argument_group_name: ClassVar[str] = "server"

    base_url: str | None = field(default=None, metadata={"no_flag": True})
    """Set by --judge."""


WINRATE = Command(
    name="winrate",
    summary="Judge the answers of two models to the same prompts, each pair in both orders.",
    groups=(WinrateSettings, JudgeServerSettings),
    common=(
        "models", "prompts", "judge", "judge_model", "out", "limit", "system", "max_new_tokens", "temperature", "top_p",
        "seed", "batch_size", "dtype", "device", "use_cpu", "api_key_env", "concurrency",
    ),
    examples=(
        "preftree winrate run1 smollm2 --prompts p.txt --judge Qwen/Qwen3-4B",
        "preftree winrate run1 run2 --prompts p.txt --judge URL --judge_model M",
    ),
)  # fmt: skip


@functools.cache
def parser() -> FlagParser:
    """The parser of `preftree winrate`."""
    return FlagParser(WINRATE)


def parse_winrate(argv: Sequence[str]) -> tuple[WinrateSettings, JudgeServerSettings]:
    """Read `A B --flag value …`. Raises SettingsError with every problem found."""
    parsed = parser().parse(argv)
    parsed.values["base_url"] = parsed.values["judge"] if "://" in parsed.values["judge"] else None
    groups = filled((WinrateSettings, JudgeServerSettings), parsed)  # type: ignore[type-var]
    refuse(parsed.problems)
    return groups[0], groups[1]  # type: ignore[return-value]
