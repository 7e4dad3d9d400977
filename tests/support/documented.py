"""Commands in the documentation: found in fenced blocks and in code spans, and parsed by what would parse them."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from packaging.requirements import InvalidRequirement, Requirement

from preftree.cli import app
from preftree.config.answers import parse_chat, parse_samples
from preftree.config.check import parse_check_settings
from preftree.config.evaluate import parse_compare, parse_evaluate
from preftree.config.export import parse_export
from preftree.config.merge import parse_merge
from preftree.config.pipeline import parse_init, parse_run
from preftree.config.prepare import parse_settings as parse_prepare
from preftree.config.report import parse_report
from preftree.config.sweep import parse_sweep
from preftree.config.train import parse_settings as parse_train
from preftree.config.watch import parse_watch
from preftree.config.winrate import parse_winrate

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/README.md", "tests/samples/README.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("CHANGELOG.md", "LOG.md")  # history
)
OWN = {"preftree", "python", "make", "pip", "torchrun", "accelerate", "mpirun", "srun", "sbatch", "docker"}
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "train": parse_train,
    "prepare": parse_prepare,
    "check": parse_check_settings,
    "evaluate": parse_evaluate,
    "compare": parse_compare,
    "report": parse_report,
    "run": parse_run,
    "sweep": parse_sweep,
    "watch": parse_watch,
    "init": parse_init,
    "chat": parse_chat,
    "samples": parse_samples,
    "merge": parse_merge,
    "export": parse_export,
    "winrate": parse_winrate,
}
STAGE = {"model_name_or_path": "M", "dataset_name": "D", "output_dir": "O"}
#: What a command cannot do without; a page that speaks of one flag leaves it out.
REQUIRED = {"train": STAGE, "prepare": STAGE, "evaluate": {"model": "M", "out": "O"}}


@dataclass(frozen=True)
class Command:
    """A command as a page shows it."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands() -> list[Command]:
    """All commands of all pages, each once."""
    found: dict[Command, None] = {}
    for path in PAGES:
        text = path.read_text("utf-8")
        page = str(path.relative_to(ROOT))
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if language in ("", "sh", "bash"):
                found |= {Command(page, line): None for line in _lines(block)}
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose):
            for part in span.split(" && "):
                if " " in part and Path(part.split()[0]).name in OWN:
                    found[Command(page, part)] = None
    return list(found)


def _lines(block: str) -> Iterator[str]:
    """Commands of a block: continued lines joined, comments and here documents left out."""
    block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        command = re.sub(r"(^|\s+)# .*$", "", line).strip()
        for part in command.split(" && "):
            if part:
                yield part


def parse(text: str) -> None:
    """Parse a command by its own parser; raises an error where a flag, a target or a file does not exist.

    `[…]` is optional and is parsed as well, of `a|b` the first is taken, and `…` stands for anything.
    """
    text = re.sub(r"\[(?!\w+\])([^\]]*--[^\]]*)\]", r"\1", text)  # [--flag X], but not preftree[eval]
    text = re.sub(r"(?<=\s)\[[^\]]*\]", "", text).replace("FLAGS", "--seed 1")
    text = re.sub(r"(--[\w-]+) …", r"\1 X", text)
    words = [word.split("|")[0].rstrip("…") for word in shlex.split(text)]
    words = [word for word in words if word and not word.startswith(">")]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    _parse(words)


def _parse(words: list[str]) -> None:
    name, rest = Path(words[0]).name, words[1:]
    if name == "preftree":
        _preftree(rest)
    elif name == "python":
        _python(rest)
    elif name == "make":
        _make(rest)
    elif name == "pip":
        _pip(rest)
    elif name in ("torchrun", "accelerate", "mpirun", "srun", "sbatch", "env"):
        _launched(rest)
    elif name == "docker":
        _docker(rest)
    elif words[0].startswith(("runs/", ".ci/", "scripts/")):
        _script(words)
    elif name not in ("cat", "cd", "git", "export", "hf"):
        raise ValueError(f"no parser for {name}: add one here, or write a command that has one")


def _preftree(words: list[str]) -> None:
    command, rest = words[0], words[1:]
    if {"--help", "--help_all"} & set(rest) or command == "--help":
        return
    if rest and rest[0].endswith(".yaml"):
        Path(rest[0]).write_text("seed: 1\n")
    given = {word.lstrip("-").replace("-", "_") for word in rest}
    for flag, value in REQUIRED.get(command, {}).items():
        rest += [] if flag in given else [f"--{flag}", value]
    if command == "check" and (not rest or rest[0].startswith("-")):
        rest = ["D", *rest]
    if command in PARSERS:
        PARSERS[command](rest)
    elif command == "lm-eval":
        from lm_eval._cli.harness import HarnessCLI

        HarnessCLI()._parser.parse_args(rest)
    elif command not in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        raise ValueError(f"preftree has no command {command}")


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "preftree":
            _preftree(rest)
        elif module not in ("pytest", "pip"):
            _script([f"{module.replace('.', '/')}.py", *rest])
    else:
        _script(words)


def _script(words: list[str]) -> None:
    path = ROOT / words[0]
    if path.name == "dpo_clm.py":
        return _preftree(["train", *words[1:]])
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        for flag in (word for word in words[1:] if word.startswith("--") and word != "--help"):
            if f'"{flag}"' not in text:
                raise ValueError(f"{words[0]} has no flag {flag}")
    return None


def _make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    for word in words:
        if "=" in word:
            if not re.search(rf"^{word.partition('=')[0]} \?=", text, re.MULTILINE):
                raise ValueError(f"the Makefile reads no variable {word.partition('=')[0]}")
        elif not re.search(rf"^{re.escape(word)}:", text, re.MULTILINE):
            raise ValueError(f"the Makefile has no target {word}")


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in words[1:]:
        if word.startswith(("-", "http")) or word == ".":
            continue
        try:
            wanted = Requirement(re.sub(r"git\+https://$", "git+https://host/x", word))
        except InvalidRequirement as error:
            raise ValueError(f"pip cannot read {word!r}: {error}") from None
        if wanted.name == "preftree" and not wanted.extras <= set(project["optional-dependencies"]):
            raise ValueError(f"preftree has no extra {wanted.extras}")


def _launched(words: list[str]) -> None:
    """What a launcher starts, if it is there: its first script, module or command of ours."""
    for index, word in enumerate(words):
        if Path(word).name in ("python", "preftree"):
            return _parse(words[index:])
        if word == "-m":
            return _python(words[index:])
        if word.endswith((".py", ".sh")):
            return _script(words[index:])
    return None


def _docker(words: list[str]) -> None:
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE))
    for before, word in itertools.pairwise(words):
        if before == "--build-arg" and word.partition("=")[0] not in declared:
            raise ValueError(f"the Dockerfile has no argument {word.partition('=')[0]}")
    if words[0] == "run" and "preftree" in words:
        rest = words[words.index("preftree") + 1 :]
        _preftree(rest or ["version"])
