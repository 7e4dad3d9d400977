"""`preftree samples`: answers of the base and of the trained model to the same prompts."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from rich.console import Console

from preftree.config.answers import SamplesSettings
from preftree.data.chat import Messages
from preftree.data.prompts import AskedPrompt, prompts_of_pairs, read_prompts
from preftree.data.sources import Source
from preftree.errors import DataError, RunError
from preftree.io.atomic import atomic_file
from preftree.io.console import next_steps, sayer
from preftree.io.jsonl import json_line
from preftree.io.progress import clock
from preftree.model.adapted import TrainedRun, find_run
from preftree.model.generate import Answer
from preftree.samples.opened import SIDES, OpenRun, open_run
from preftree.samples.show import show_rows, write_rows_html
from preftree.text.differences import answer_rows


def run(settings: SamplesSettings, console: Console | None = None) -> None:
    """Answer and show.

    Raises:
        PreftreeError: whatever the user can fix, before a model is loaded.
    """
    console = console or Console()
    say, started = sayer(console), time.perf_counter()
    for flag, name in (("--html", settings.html), ("--jsonl", settings.jsonl)):
        refuse_existing(flag, name)
    if settings.prompts:
        prompts, where = read_prompts(settings.prompts, settings.limit), settings.prompts
    else:
        prompts, where = prompts_of_run(find_run(settings.run, settings.model), settings.limit)
    opened = open_run(settings, say)
    say(f"prompts    {len(prompts)} ({where})")
    ids = [opened.ids(_messages(opened, prompt)) for prompt in prompts]
    found = {side: opened.answers(side, ids, settings.batch_size) for side in SIDES}
    texts = {side: [answer.text for answer in found[side]] for side in SIDES}
    rows = answer_rows([prompt.shown for prompt in prompts], texts["base"], texts["trained"])
    say("")
    show_rows(console, rows)
    if settings.html:
        write_rows_html(Path(settings.html), opened, rows)
        say(f"saved      {settings.html}")
    if settings.jsonl:
        _write(Path(settings.jsonl), opened, prompts, found)
        say(f"saved      {settings.jsonl}")
    seconds = time.perf_counter() - started
    say(f"done       {sum(row.changed for row in rows)} of {len(rows)} answers changed, in {clock(seconds)}")
    cut = {side: sum(not answer.finished for answer in found[side]) for side in SIDES}
    if any(cut.values()):
        most = settings.max_new_tokens
        say(
            f"           cut at {most} tokens: {cut['base']} of the base model's, {cut['trained']} of the trained one's"
        )
    place = shlex.quote(settings.run)
    base = shlex.quote(opened.run.base_name)
    next_steps(say, f"preftree chat {place}", f"preftree winrate {place} {base} --prompts FILE --judge MODEL")


def prompts_of_run(run: TrainedRun, limit: int) -> tuple[list[AskedPrompt], str]:
    """Prompts that a run was validated on or, where it has no file of these, trained on; and where they are from.

    Raises:
        DataError: the run does not say, or its data is gone.
    """
    data = run.group("data")
    for name, what in ((data.get("validation_file"), "held out"), (data.get("dataset_name"), "the data of the run")):
        if name:
            return prompts_of_pairs(Source(str(name), config=data.get("dataset_config_name")), limit), f"{name}, {what}"
    raise DataError(f"{run.folder} does not say what it was trained on: name a file of prompts by --prompts.")


def refuse_existing(flag: str, name: str | None) -> None:
    """Raise RunError where a file that is to be written is there already, or its folder is not."""
    if name is None:
        return
    path = Path(name)
    if path.exists():
        raise RunError(f"{flag} {name} exists and is not overwritten. Give another name.")
    if not path.absolute().parent.is_dir():
        raise RunError(f"{flag} {name}: there is no folder {path.parent}. Make it, or give another place.")


def _messages(opened: OpenRun, prompt: AskedPrompt) -> Messages:
    return opened.messages(prompt.turns, opened.system if opened.system is not None else prompt.system)


def _write(path: Path, opened: OpenRun, prompts: list[AskedPrompt], found: dict[str, list[Answer]]) -> None:
    with atomic_file(path, "w") as file:
        for row, prompt in enumerate(prompts):
            record: dict[str, object] = {"prompt": _messages(opened, prompt)}
            for side in SIDES:
                record |= {side: found[side][row].text, f"{side}_finished": found[side][row].finished}
            file.write(json_line(record))
