"""What `preftree export` can be told. The docstring below a field is its help text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from preftree.config.checks import one_of, refuse, within
from preftree.config.parser import Command, FlagParser, settings_of

FORMATS = ("gguf", "openvino", "ollama")
#: Precisions of llama.cpp's converter that need no calibration.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass
class ExportSettings:
    """What is exported, and as what."""

    _argument_group_name: ClassVar[str] = "export"

    run: str = field(default="", metadata={"positional": True})
    """Folder of a run (its adapter is merged first) or of a merged model."""
    to: str = field(default="", metadata={"choices": FORMATS})
    """gguf (llama.cpp), openvino, or ollama (a Modelfile with what it needs)."""
    out: str = ""
    """The file (gguf) or folder to write; it must not exist."""
    model: str | None = None
    """The base model, where another place than the recorded one is meant."""
    gguf_type: str = field(default="f16", metadata={"choices": GGUF_TYPES})
    """Precision of a GGUF file: f32, f16, bf16 or q8_0."""
    converter: str | None = None
    """convert_hf_to_gguf.py of a llama.cpp checkout, or optimum-cli, where they are not on the PATH."""
    pairs: str | None = None
    """Preference pairs to verify on; by default the data of the run."""
    limit: int = 4
    """Pairs to verify on."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.run:
            problems.append("name the folder of a run or of a model: preftree export RUN --to gguf --out FILE")
        if self.to:
            one_of(problems, "to", self.to, FORMATS)
        else:
            problems.append(f"--to is missing: {', '.join(FORMATS)}.")
        if not self.out:
            problems.append("--out is missing: name the file or folder to write.")
        elif self.to == "gguf" and not self.out.endswith(".gguf"):
            problems.append(f"--out must end with .gguf for --to gguf. Got {self.out!r} instead.")
        one_of(problems, "gguf_type", self.gguf_type, GGUF_TYPES)
        within(problems, "limit", self.limit, 1)
        refuse(problems)


EXPORT = Command(
    name="export",
    summary="Write a run for llama.cpp, OpenVINO or Ollama, by their own converters, and read the result back.",
    groups=(ExportSettings,),
    common=("run", "to", "out", "model", "gguf_type", "converter", "pairs", "limit"),
    examples=(
        "preftree export run1 --to gguf --out run1.gguf",
        "preftree export run1-merged --to openvino --out run1-openvino",
        "preftree export run1 --to ollama --out run1-ollama",
    ),
)


@functools.cache
def parser() -> FlagParser:
    """The parser of `preftree export`."""
    return FlagParser(EXPORT)


def parse_export(argv: Sequence[str]) -> ExportSettings:
    """Read `RUN --to FORMAT --out PLACE --flag value …`. Raises SettingsError with every problem found."""
    return settings_of(parser(), ExportSettings, argv)
