"""What `preftree merge` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse, within
from preftree.config.parser import Command, FlagParser, settings_of

#: Precisions that a merged model can be written in.
MERGED_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class MergeSettings:
    """Which adapter is merged, and where the model goes."""

    _argument_group_name: ClassVar[str] = "merge"

    run: str = field(default="", metadata={"positional": True})
    """Folder of a run, of one of its checkpoints, or of any PEFT adapter."""
    out: str = ""
    """Folder for the merged model; it must not exist or be empty."""
    model: str | None = None
    """The base model, where another place than the recorded one is meant."""
    dtype: str = field(default="auto", metadata={"choices": MERGED_DTYPES})
    """Precision of the written weights: auto (that of the base's files), float32, bfloat16 or float16."""
    pairs: str | None = None
    """Preference pairs to verify the model on; by default the data of the run."""
    limit: int = 8
    """Pairs to verify on."""
    verify: str | None = None
    """Write nothing: verify that the model in this folder is RUN merged."""
    overwrite: bool = False
    """Replace an earlier merged model in --out."""
    push: str | None = None
    """Upload the verified model to this hub repository, as ORGANIZATION/NAME."""
    private: bool = True
    """Make the hub repository private if it is made."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.run:
            problems.append("name the folder of a run: preftree merge RUN --out MERGED")
        if bool(self.out) == bool(self.verify):
            problems.append("give either --out, a folder for the merged model, or --verify, the folder of one.")
        if self.verify and self.push:
            problems.append("--push uploads what --out has written; leave one of --verify and --push out.")
        if self.push is not None and self.push.count("/") != 1:
            problems.append(f"--push takes ORGANIZATION/NAME. Got {self.push!r} instead.")
        one_of(problems, "dtype", self.dtype, MERGED_DTYPES)
        within(problems, "limit", self.limit, 1)
        refuse(problems)


MERGE = Command(
    name="merge",
    summary="Merge an adapter into its base model, shard by shard, and verify the result before it gets its name.",
    groups=(MergeSettings,),
    common=("run", "out", "model", "dtype", "pairs", "limit", "verify", "overwrite", "push", "private"),
    examples=(
        "preftree merge run1 --out run1-merged",
        "preftree merge run1 --verify run1-merged",
        "preftree merge run1 --out run1-merged --dtype bfloat16 --push me/my-model",
    ),
)


@functools.cache
def parser() -> FlagParser:
    """The parser of `preftree merge`."""
    return FlagParser(MERGE)


def parse_merge(argv: Sequence[str]) -> MergeSettings:
    """Read `RUN --out FOLDER --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(parser(), MergeSettings, argv)
