"""What `preftree run` and `preftree init` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse
from preftree.config.parser import Command, FlagParser, settings_of

STAGES = ("prepare", "check", "train", "evaluate", "report")


@dataclass
class PipelineSettings:
    """Which pipeline is run, and which part of it."""

    _argument_group_name: ClassVar[str] = "run"

    pipeline: str | None = field(default=None, metadata={"positional": True})
    """The file of the pipeline; preftree init writes one."""
    dry_run: bool = False
    """Show what would run, and why, and stop."""
    from_stage: str | None = field(default=None, metadata={"choices": STAGES})
    """Run this stage and those after it, also where nothing has changed."""
    only: str | None = field(default=None, metadata={"choices": STAGES})
    """Run this stage alone, with what the others have left."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.pipeline:
            problems.append("name the file of the pipeline: preftree run pipeline.yaml; preftree init writes one.")
        for name in ("from_stage", "only"):
            if (stage := getattr(self, name)) is not None:
                one_of(problems, name, stage, STAGES)
        if self.from_stage and self.only:
            problems.append("--from and --only contradict each other: leave one of them out.")
        refuse(problems)


@dataclass
class InitSettings:
    """What a pipeline is written for."""

    _argument_group_name: ClassVar[str] = "init"

    model_name_or_path: str | None = None
    """The model to be trained: a folder, a hub id or smollm2."""
    dataset_name: str | None = None
    """Its preference data: a file, a folder or a hub id."""
    out: str = "pipeline.yaml"
    """The file to write; one that is there is not overwritten."""

    def __post_init__(self) -> None:
        refuse([f"--{name} is missing" for name in ("model_name_or_path", "dataset_name") if not getattr(self, name)])


RUN = Command(
    name="run",
    summary="Run a pipeline: prepare, check, train, evaluate, report; what is done already is not done again.",
    groups=(PipelineSettings,),
    common=("pipeline", "dry_run", "from_stage", "only"),
    settings_file=False,
    examples=(
        "preftree run pipeline.yaml",
        "preftree run pipeline.yaml --dry-run",
        "preftree run pipeline.yaml --from evaluate",
    ),
)
INIT = Command(
    name="init",
    summary="Write a commented pipeline for a model and its data, with what was found out about them.",
    groups=(InitSettings,),
    common=("model_name_or_path", "dataset_name", "out"),
    examples=("preftree init --model smollm2 --dataset_name pairs.jsonl",),
)


@functools.cache
def run_parser() -> FlagParser:
    """The parser of `preftree run`, whose one word is a file and no settings."""
    return FlagParser(RUN)


@functools.cache
def init_parser() -> FlagParser:
    """The parser of `preftree init`."""
    return FlagParser(INIT)


def parse_run(argv: Sequence[str]) -> PipelineSettings:
    """Read `FILE --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(run_parser(), PipelineSettings, argv)


def parse_init(argv: Sequence[str]) -> InitSettings:
    """Read `--flag value …`. Raises SettingsError with every problem found."""
    return settings_of(init_parser(), InitSettings, argv)
