"""`preftree run`: which tasks have to run and why, one after another, each as a command in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import run as run_process
from typing import Any

from rich.console import Console

from preftree.config.pipeline import STAGES, PipelineSettings
from preftree.errors import RunError
from preftree.io.atomic import write_json
from preftree.io.console import IN_PIPELINE, next_steps, sayer
from preftree.io.jsonl import read_object
from preftree.io.lock import folder_lock
from preftree.io.run_folder import fact_differences, make_folder
from preftree.pipeline.digest import Digests
from preftree.pipeline.file import Pipeline, read_pipeline
from preftree.pipeline.tasks import Task, key_of, tasks_of

_RECORD = "pipeline.json"


@dataclass(frozen=True)
class Decision:
    """What becomes of a task: its key and folder, whether it runs, why, and whether its folder is emptied before."""

    key: str
    folder: Path
    facts: Mapping[str, Any]
    runs: bool
    why: str
    anew: bool = False


def run(settings: PipelineSettings, console: Console | None = None) -> int:
    """Run a pipeline; returns 0, or the exit code of the task that ended it.

    Raises:
        PreftreeError: the file has mistakes, or the output folder cannot be used.
    """
    runner = Runner(read_pipeline(Path(settings.pipeline or "")), settings, console or Console())
    if settings.dry_run:
        return runner.run()
    make_folder("output", str(runner.pipeline.output))
    with folder_lock(runner.pipeline.output / ".lock", runner.pipeline.output):
        return runner.run()


class Runner:
    """Goes through the tasks of a pipeline."""

    def __init__(self, pipeline: Pipeline, settings: PipelineSettings, console: Console) -> None:
        self.pipeline, self.settings, self.say = pipeline, settings, sayer(console)
        self.digests = Digests(pipeline.output / ".digests.json")
        self.record = read_object(pipeline.output / _RECORD)
        self.folders: dict[str, Path] = {}

    def run(self) -> int:
        """Every task that has to run; with --dry-run, what would run."""
        pending: set[str] = set()
        for task in tasks_of(self.pipeline):
            if first := next((name for name in task.needs if name in pending), None):
                self._show(task, f"would run, since {first} would" if self._wanted(task) else "left out")
                pending.add(task.name)
                continue
            decision = self.decide(task)
            self.folders[task.name] = decision.folder
            if not decision.runs:
                self._show(task, f"{decision.why} ({decision.folder})")
            elif self.settings.dry_run:
                self._show(task, f"would run: {decision.why}")
                pending.add(task.name)
            elif code := self._run(task, decision):
                return code
        if not self.settings.dry_run and self.settings.only is None and "train" in self.folders:
            trained = shlex.quote(str(self.folders["train"]))
            commands = (f"chat {trained}", f"samples {trained}", f"merge {trained} --out {trained}-merged")
            next_steps(self.say, *(f"preftree {command}" for command in commands))
        return 0

    def decide(self, task: Task) -> Decision:
        """Does a task have to run? The tasks before it are done.

        Raises:
            RunError: an earlier stage that --only leaves out has left nothing.
        """
        facts = task.facts(self.folders, self.digests)
        key = key_of(facts)
        folder = self.pipeline.output / f"{task.name}-{key}"
        done, why = self._done(task, key, folder, facts)
        if not self._wanted(task):
            if not done and (last := self._last_folder(task)) is not None:
                return Decision(key, last, facts, False, "left out; the last one is used")
            if not done and task.name != "check":
                raise RunError(f"{task.stage} has left nothing that the stages after it could use: run it first.")
            return Decision(key, folder, facts, False, "left out")
        asked = task.stage in (self.settings.only, self.settings.from_stage)
        if done and (asked or self._after_from(task)):
            return Decision(key, folder, facts, True, "asked for", anew=True)
        return Decision(key, folder, facts, not done, why, anew=key in self.record.get(task.name, {}).get("made", {}))

    def _after_from(self, task: Task) -> bool:
        start = self.settings.from_stage
        return start is not None and STAGES.index(task.stage) > STAGES.index(start)

    def _wanted(self, task: Task) -> bool:
        """Is it one of the stages that were asked for?"""
        only, start = self.settings.only, self.settings.from_stage
        return (only is None or task.stage == only) and (
            start is None or STAGES.index(task.stage) >= STAGES.index(start)
        )

    def _done(self, task: Task, key: str, folder: Path, facts: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether a task is done, and a word on why or why not."""
        entry = self.record.get(task.name, {})
        known = entry.get("made", {}).get(key)
        outputs = task.outputs(folder)
        if known is None:
            last = entry.get("facts")
            if not last:
                return False, "it has not run yet"
            changes = fact_differences(last, facts)
            return False, "; ".join(changes) if changes else "it was interrupted, and goes on"
        if not outputs:
            return False, f"what it made is gone from {folder}"
        if self.digests.of_files(outputs, folder) != known:
            return False, f"what it made is another now in {folder}"
        return True, f"unchanged, {key}"

    def _last_folder(self, task: Task) -> Path | None:
        key = self.record.get(task.name, {}).get("last")
        folder = self.pipeline.output / f"{task.name}-{key}"
        return folder if key and task.outputs(folder) else None

    def _run(self, task: Task, decision: Decision) -> int:
        """Run a task's command; returns 0 or its exit code."""
        if decision.anew or not task.goes_on:
            shutil.rmtree(decision.folder, ignore_errors=True)
        decision.folder.mkdir(parents=True, exist_ok=True)
        words = task.words(self.folders, decision.folder)
        self._show(task, f"runs: {decision.why}")
        self.say(f"           $ {shlex.join(['preftree', *words])}")
        entry = self.record.setdefault(task.name, {"made": {}})
        entry["facts"] = decision.facts
        self._save()
        launch = list(task.launch) or [sys.executable]
        environment = {**os.environ, IN_PIPELINE: "1"}
        code = run_process([*launch, "-m", "preftree", *words], env=environment).returncode
        outputs = task.outputs(decision.folder)
        if code == 0 and not outputs:
            self.say(f"error: {task.name} ended without writing {task.done} into {decision.folder}")
            return 1
        if code and not (task.may_stop and code == 1):
            self.say(f"stopped    {task.name} ended with code {code}; the same command goes on from here")
            return 128 - code if code < 0 else code
        if code:
            self.say(f"stopped    the check found what would spoil training: {decision.folder / 'check.html'}")
            file = shlex.quote(str(self.settings.pipeline))
            self.say(f"           repair the data, or go on all the same: preftree run {file} --from train")
            return code
        entry["made"][decision.key] = self.digests.of_files(outputs, decision.folder)
        entry["last"] = decision.key
        self._save()
        return 0

    def _save(self) -> None:
        write_json(self.pipeline.output / _RECORD, self.record)
        self.digests.save()

    def _show(self, task: Task, text: str) -> None:
        self.say(f"{task.name:10} {text}")
