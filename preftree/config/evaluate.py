"""What `preftree evaluate` and `preftree compare` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse, within
from preftree.config.choices import DTYPES
from preftree.config.parser import Command, FlagParser, settings_of


@dataclass
class EvaluateSettings:
    """What is evaluated, on what, and how."""

    _argument_group_name: ClassVar[str] = "evaluate"

    model: str = ""
    """Model to evaluate: a folder, a hub id, or smollm2, the small model that comes with the demo."""
    out: str = ""
    """Folder for lm-eval's results and samples; it must not hold others."""
    adapter: str | None = None
    """Folder of a PEFT adapter on the model."""
    tasks: str = "openllm"
    """openllm (the leaderboard's four), or lm-eval's names, separated by commas."""
    data: str = "hub"
    """hub, or a folder of local files (see docs/evaluation.md)."""
    limit: int | None = None
    """Questions per task (of MMLU, per subject), and held-out pairs; for trying out."""
    num_fewshot: int | None = None
    """Few-shot examples, instead of the leaderboard's number."""
    apply_chat_template: bool = False
    """Put questions into the model's chat template."""
    dtype: str = field(default="auto", metadata={"choices": (*DTYPES, "float64")})
    """Precision of weights and computation: auto (what is fast here), float32, bfloat16, float16 or float64."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default a GPU if there is one."""
    use_cpu: bool = False
    """Compute on the CPU even if there is a GPU: --device cpu."""
    max_length: int | None = None
    """Longest input in tokens, instead of the model's positions."""
    truncate: bool = False
    """Cut what is too long on its left instead of refusing."""
    tokens_per_forest: int | None = None
    """Tokens per forward pass."""
    batch_size: int = 1
    """Batch size of generation; log-likelihoods need none."""
    preferences: str | None = None
    """Held-out preference pairs to score as well, in any of train's formats."""
    cache: bool = True
    """Use answers from earlier runs of this model, and keep new ones."""
    export_data: str | None = None
    """Write the tasks' local files from the hub into this folder, and stop."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.export_data is None:
            problems += [f"--{name} is missing: {what}." for name, what in _NEEDED.items() if not getattr(self, name)]
        within(problems, "num_fewshot", self.num_fewshot, 0)
        for name in ("limit", "max_length", "tokens_per_forest", "batch_size"):
            within(problems, name, getattr(self, name), 1)
        one_of(problems, "dtype", self.dtype, (*DTYPES, "float64"))
        if self.use_cpu and not (self.device or "cpu").startswith(("cpu", "auto")):
            problems.append(f"--use_cpu and --device {self.device} contradict each other: leave one of them out.")
        refuse(problems)
        if self.use_cpu:
            self.device = self.device if (self.device or "").startswith("cpu") else "cpu"
        elif self.device == "auto":
            self.device = None


#: Flags that must be given, and what to give.
_NEEDED = {"model": "name a hub id or a model folder", "out": "name a folder for the results"}


@dataclass
class CompareSettings:
    """Which evaluations are compared."""

    _argument_group_name: ClassVar[str] = "compare"

    runs: list[str] = field(default_factory=list, metadata={"positional": True})
    """Folders of evaluations, the one to compare with first."""
    out: str | None = None
    """Folder for compare.md and compare.json."""
    seeds: bool = False
    """Each folder after the first holds evaluations of one recipe, a folder per seed: questions are averaged over
    them."""

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            refuse(["name the folders of two evaluations at least: preftree compare BASE OTHER …"])


EVALUATE = Command(
    name="evaluate",
    summary="Score a model on lm-eval's tasks; every prefix that their questions share is computed once.",
    groups=(EvaluateSettings,),
    common=(
        "model", "out", "adapter", "tasks", "data", "limit", "num_fewshot", "apply_chat_template", "dtype", "device",
        "max_length", "truncate", "tokens_per_forest", "batch_size", "preferences", "cache", "export_data",
    ),
    examples=(
        "preftree evaluate --model smollm2 --data files --out eval/base",
        "preftree evaluate --model smollm2 --adapter run1 --data files --out eval/run1",
        "preftree evaluate --model M --tasks arc_challenge --limit 50 --out eval/trial",
    ),
)  # fmt: skip
COMPARE = Command(
    name="compare",
    summary="Put evaluations side by side: scores, differences with 95 % intervals, questions that flipped.",
    groups=(CompareSettings,),
    common=("runs", "out", "seeds"),
    examples=(
        "preftree compare eval/base eval/run1 --out comparison",
        "preftree compare eval/base eval/recipe --seeds --out comparison",
    ),
)


@functools.cache
def evaluate_parser() -> FlagParser:
    """The parser of `preftree evaluate`."""
    return FlagParser(EVALUATE)


@functools.cache
def compare_parser() -> FlagParser:
    """The parser of `preftree compare`."""
    return FlagParser(COMPARE)


def parse_evaluate(argv: Sequence[str]) -> EvaluateSettings:
    """Read `[settings.yaml] --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(evaluate_parser(), EvaluateSettings, argv)


def parse_compare(argv: Sequence[str]) -> CompareSettings:
    """Read `RUNS … --out FOLDER`. Raises SettingsError with every problem found."""
    return settings_of(compare_parser(), CompareSettings, argv)
