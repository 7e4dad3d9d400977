"""The commands of a pipeline: what each reads, where it writes, and how one tells that it is done.

A task's key is a hash of its command line, the contents it reads, and the version; its folder carries the key. So
nothing is ever overwritten, a task that was interrupted goes on in its folder, and settings that are switched back
find what they made before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftree import __version__
from preftree.pipeline.digest import Digests
from preftree.pipeline.file import Pipeline

#: Flags of training that a check of its data needs as well.
_FOR_CHECK = ("max_length", "max_prompt_length", "pair_rule", "min_margin")

Folders = Mapping[str, Path]


@dataclass(frozen=True)
class Task:
    """One command of a stage.

    Args:
        name: of the task, and of its folder before the key.
        inputs: names of what it reads, by what they are called in reasons; of a task's folder, its name.
        words: its command line, given the folders of the tasks before it and its own.
        done: files below its folder that are there once it is done, as a glob; their contents are what it made.
        launch: words in front of the command.
        may_stop: does exit code 1 say that the pipeline should stop, rather than that it failed?
        goes_on: does the command go on with what an interrupted one has left in its folder?
        needs: names of the tasks whose folders it reads, where these are part of the pipeline.
    """

    name: str
    stage: str
    inputs: Callable[[Folders], dict[str, str]]
    words: Callable[[Folders, Path], list[str]]
    done: str
    launch: Sequence[str] = ()
    may_stop: bool = False
    goes_on: bool = False
    needs: Sequence[str] = ()

    def facts(self, folders: Folders, digests: Digests) -> dict[str, Any]:
        """What decides what it makes: its command line, what it reads by content, and the version."""
        flags: dict[str, str] = {}
        last = "command"
        for word in self.words(folders, Path("O")):
            for place in folders.values():  # a folder of another name with the same content makes the same
                word = word.replace(str(place), "INPUT")
            last = word if word.startswith("--") else last
            flags[last] = f"{flags.get(last, '')} {word}".strip() if word != last else ""
        read = {f"content of {name}": digests.of(path) for name, path in self.inputs(folders).items()}
        return {**flags, **read, "preftree": __version__}

    def outputs(self, folder: Path) -> list[Path]:
        """What it has made."""
        return sorted(folder.glob(self.done))


def key_of(facts: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def tasks_of(pipeline: Pipeline) -> list[Task]:
    """The tasks of a pipeline in the order in which they run."""
    make = (_prepare, _check, _train, _evaluate, _report)
    return [task for each in make for task in each(pipeline)]


def _data(pipeline: Pipeline) -> Callable[[Folders], str]:
    return lambda folders: str(folders["prepare"]) if "prepare" in folders else pipeline.data


def _prepare(pipeline: Pipeline) -> list[Task]:
    if "prepare" not in pipeline.flags:
        return []
    flags = pipeline.flags["prepare"]
    model = [] if "--model_name_or_path" in flags else ["--model_name_or_path", pipeline.model]
    return [
        Task(
            "prepare",
            "prepare",
            lambda folders: {"data": pipeline.data},
            lambda folders, own: [
                "prepare", "--dataset_name", pipeline.data, *model, *flags, "--output_dir", str(own)
            ],
            "train.*",
            goes_on=True,
        )
    ]  # fmt: skip


def _check(pipeline: Pipeline) -> list[Task]:
    if "check" not in pipeline.flags:
        return []
    flags, data = list(pipeline.flags["check"]), _data(pipeline)
    train = pipeline.flags["train"]
    for name in _FOR_CHECK:
        if f"--{name}" in train and f"--{name}" not in flags:
            flags += [f"--{name}", train[train.index(f"--{name}") + 1]]
    return [
        Task(
            "check",
            "check",
            lambda folders: {"data": data(folders)},
            lambda folders, own: [
                "check", data(folders), "--model_name_or_path", pipeline.model, *flags,
                "--html", str(own / "check.html"),
            ],
            "check.html",
            may_stop=True,
            needs=["prepare"],
        )
    ]  # fmt: skip


def _train(pipeline: Pipeline) -> list[Task]:
    data = _data(pipeline)
    heldout = ["--validation_file", pipeline.heldout] if pipeline.heldout else []

    def inputs(folders: Folders) -> dict[str, str]:
        more = {"held-out pairs": pipeline.heldout} if pipeline.heldout else {}
        return {"data": data(folders), "model": pipeline.model, **more}

    def words(folders: Folders, own: Path) -> list[str]:
        place = ["--model_name_or_path", pipeline.model, "--dataset_name", data(folders), *heldout]
        return ["train", *place, *pipeline.flags["train"], "--output_dir", str(own)]

    return [
        Task(
            "train",
            "train",
            inputs,
            words,
            "adapter_model.safetensors",
            pipeline.launch,
            goes_on=True,
            needs=["prepare"],
        )
    ]


def _evaluate(pipeline: Pipeline) -> list[Task]:
    if "evaluate" not in pipeline.flags:
        return []
    heldout = ["--preferences", pipeline.heldout] if pipeline.heldout else []
    base = ["evaluate", "--model", pipeline.model, *heldout, *pipeline.flags["evaluate"]]

    def inputs(folders: Folders) -> dict[str, str]:
        return {"model": pipeline.model, **({"held-out pairs": pipeline.heldout} if pipeline.heldout else {})}

    def tuned(folders: Folders) -> dict[str, str]:
        return inputs(folders) | {"adapter": str(folders["train"] / "adapter_model.safetensors")}

    return [
        Task("before", "evaluate", inputs, lambda folders, own: [*base, "--out", str(own)], "**/results_*.json"),
        Task(
            "after",
            "evaluate",
            tuned,
            lambda folders, own: [*base, "--adapter", str(folders["train"]), "--out", str(own)],
            "**/results_*.json",
            needs=["train"],
        ),
        Task(
            "compare",
            "evaluate",
            lambda folders: {"before": str(folders["before"]), "after": str(folders["after"])},
            lambda folders, own: ["compare", str(folders["before"]), str(folders["after"]), "--out", str(own)],
            "compare.json",
            needs=["before", "after"],
        ),
    ]


def _report(pipeline: Pipeline) -> list[Task]:
    if "report" not in pipeline.flags:
        return []
    flags = pipeline.flags["report"]
    ending = "md" if "md" in flags else "html"

    def inputs(folders: Folders) -> dict[str, str]:
        table = {"scores": str(folders["compare"])} if "compare" in folders else {}
        return {"run": str(folders["train"] / "run"), **table}

    def words(folders: Folders, own: Path) -> list[str]:
        table = ["--compare", str(folders["compare"])] if "compare" in folders else []
        return ["report", str(folders["train"]), *table, *flags, "--out", str(own / f"report.{ending}")]

    return [Task("report", "report", inputs, words, f"report.{ending}", needs=["train", "compare"])]
