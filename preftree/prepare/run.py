"""The stage: settings in, a folder with pairs, manifest and card out; called again after a kill, it continues."""

from __future__ import annotations

import errno
import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.console import Console

from preftree import __version__
from preftree.config.prepare import PrepareSettings
from preftree.data.chat import Chat, Messages
from preftree.data.sources import refuse_inside
from preftree.errors import DataError, RunError
from preftree.hardware.device import choose_device
from preftree.hardware.environment import environment
from preftree.hardware.precision import choose_dtype
from preftree.io.atomic import atomic_file
from preftree.io.console import next_steps, sayer
from preftree.io.lock import folder_lock, removed_if_unused
from preftree.io.progress import Progress
from preftree.model.load import ModelSource, resolve
from preftree.prepare.card import card
from preftree.prepare.engines import make_engine
from preftree.prepare.engines.local import RenderTokens, make_chat, question_messages
from preftree.prepare.folder import PrepareFolder
from preftree.prepare.generate import Generated, Prompt, Render, SamplingPlan, generate
from preftree.prepare.journal import Journal
from preftree.prepare.judge import judge
from preftree.prepare.output import pairs, write_manifest, write_pairs
from preftree.prepare.select import Passes, Selected, Selection, benchmark_questions, make_examiner, select
from preftree.prepare.source import UNREADABLE, find_places, unreadable
from preftree.prepare.workers import InProcess, Threads, Workers
from preftree.text.language import language

#: Rows that cannot be read of which it is said why.
SHOWN = 3
#: Errors of a disk that is full or read-only.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}
#: Questions whose language is guessed, for the card.
LANGUAGE_SAMPLE = 500


def prepare(settings: PrepareSettings, console: Console | None = None) -> None:
    """Run the stage, or what is left of it.

    Raises PreftreeError for what the user can fix; what was done until then is kept.
    """
    console = console or Console(soft_wrap=True)
    say = sayer(console)
    for note in settings.notes:
        say(f"note: {note}")
    folder = PrepareFolder(settings.output.output_dir or "", settings.output.output_format)
    refuse_inside("--output_dir", settings.output.output_dir, settings.source.dataset_name)
    folder.check()
    with removed_if_unused(folder.root, folder.bookkeeping):
        folder.make()
        with folder_lock(folder.lock, folder.root), _told_of_the_disk(folder):
            _prepare(folder, settings, console, say)


def _prepare(folder: PrepareFolder, settings: PrepareSettings, console: Console, say: Callable[[str], None]) -> None:
    """The stage in a folder that is this process's."""
    folder.remove_leftovers()
    _claim(folder, settings, say)
    if folder.manifest.exists():
        say(f"{folder.pairs} is complete; nothing is left to do.")
        return
    chat = make_chat(settings)
    for line in chat.notes:
        say(f"note: {line}")
    selection = _selection(folder, settings, console)
    generated = _generated(folder, settings, selection, chat, console)
    _write(folder, settings, selection, generated, chat, say)


@contextmanager
def _told_of_the_disk(folder: PrepareFolder) -> Iterator[None]:
    """Raise RunError for a disk that takes nothing more."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise RunError(
            f"--output_dir {folder.root} cannot be written ({error.strerror}). What was done is kept: start the same"
            " command again when there is room."
        ) from error


def _claim(folder: PrepareFolder, settings: PrepareSettings, say: Callable[[str], None]) -> None:
    """Claim the folder, and say on which device and in which precision answers are generated."""
    local = settings.generate.engine != "openai"
    known = _environment(settings)
    model = {"name": settings.generate.model_name_or_path, "revision": model_revision(settings) if local else None}
    again = folder.claim(settings.with_effect(), model, known)
    if again and len(folder.state()["environments"]) > 1:
        say(
            "note: this run began with other software or hardware (manifest.yaml will list both): answers made from"
            " here on may differ from those that one machine would have made."
        )
    if settings.generate.engine == "transformers":
        device = choose_device(settings.generate.device)
        say(f"device     {device}")
        say(f"precision  {choose_dtype(device.value, settings.generate.torch_dtype)}")


# --- select ---------------------------------------------------------------------------------------


def _selection(folder: PrepareFolder, settings: PrepareSettings, console: Console) -> Selection:
    """The selection of this folder: as it stands there, or made now."""
    say = sayer(console)
    if folder.selected.exists():
        selection = Selection.read(folder.selected)
        say(f"selected   {len(selection.rows)} rows, by an earlier run")
        return selection
    questions = list(benchmark_questions(settings.select.decontaminate, say))
    counts = Counter(question.benchmark for question in questions)
    if questions:
        say(f"test sets  {', '.join(f'{name} {count}' for name, count in counts.items())}")
    places = find_places(settings.source)
    workers = _workers(settings)
    passes = Passes(places, workers, _Reading(console)) if isinstance(workers, InProcess) else Passes(places, workers)
    examiner = partial(make_examiner, settings, questions)
    # Made with the first row examined, so that its rate leaves out the passes over the whole source before that.
    progress = cache(lambda: Progress(console, "selecting  ", "rows"))
    selection = select(passes, settings.select, examiner, lambda done, total: progress()(done, total))
    for line in _counts(selection, settings.select.num_samples):
        say(line)
    for line in unreadable(places, min(selection.removed[UNREADABLE], SHOWN)):
        say(f"           cannot be read: {line}")
    if not selection.rows:
        raise DataError(f"No row of {settings.source.dataset_name} is left: see the counts above.")
    selection.write(folder.selected)
    return selection


class _Reading:
    """Progress of each pass over all files of the source."""

    def __init__(self, console: Console) -> None:
        self.console, self.rows, self.last = console, 0, 0
        self.progress: Progress | None = None

    def __call__(self, rows: int, total: int | None) -> None:
        self.progress = self.progress or Progress(self.console, "reading    ", "rows")
        if total is None:
            self.rows += rows
            self.progress(self.rows, self.last or None)  # from the second pass on it is known how many there are
        else:
            self.last = max(self.last, self.rows)
            self.progress(total, total)
            self.progress, self.rows = None, 0


def _counts(selection: Selection, asked: int) -> list[str]:
    lines = [f"source     {selection.source_rows} rows, {selection.strata} strata"]
    lines += [f"           − {count}: {reason}" for reason, count in selection.removed.most_common()]
    lines.append(f"examined   {selection.examined} candidates")
    lines += [f"           − {count}: {reason}" for reason, count in selection.rejected.most_common()]
    short = "" if len(selection.rows) >= asked else f" (of {asked} asked for: no more passed)"
    lines.append(f"selected   {len(selection.rows)} rows{short}")
    for what in ("family", "teacher") if selection.rows else ():
        counts = Counter(getattr(row, what) for row in selection.rows)
        lines.append(f"           by {what}: {', '.join(f'{name} {count}' for name, count in counts.most_common())}")
    return lines


# --- generate -------------------------------------------------------------------------------------


def _generated(
    folder: PrepareFolder, settings: PrepareSettings, selection: Selection, chat: Chat, console: Console
) -> Generated:
    wanted = settings.generate
    plan = SamplingPlan(settings.select.seed, wanted.num_rejected, wanted.batch_size or 1, wanted.rounds)
    prompts = [_prompt(row, settings, chat) for row in selection.rows]
    workers: Workers = _workers(settings)
    render: Render = RenderTokens(chat)
    if wanted.engine == "openai":
        workers, render = Threads(settings.server.concurrency), _render_messages
    say = sayer(console)

    def progress(attempt: int, there: int) -> Progress:
        if there:
            say(f"round {attempt + 1}    {there} answers are there from an earlier run")
        return Progress(console, f"round {attempt + 1}    ", "answers")

    journal = Journal(folder.answers)
    result = generate(prompts, plan, render, workers, partial(make_engine, settings), journal, progress)
    for reason, count in result.refused.most_common():
        say(f"           {count} answers asked for again or given up: {reason}")
    return result


def _prompt(row: Selected, settings: PrepareSettings, chat: Chat) -> Prompt:
    if settings.generate.engine == "openai":  # the server's template decides what becomes of a system text
        messages = [{"role": "system", "content": row.system}] if row.system else []
        messages.append({"role": "user", "content": row.question})
    else:
        messages = question_messages(chat, row.system, row.question)
    rules = {"max_similarity": settings.generate.max_similarity, "cut_answers": settings.generate.cut_answers}
    return Prompt(
        row.key,
        lambda number, attempt: messages,
        lambda answer, others: judge(answer, row.chosen, others, **rules),  # type: ignore[arg-type]
    )


def _render_messages(messages: Messages) -> tuple[Messages, int]:
    return messages, sum(len(message["content"]) for message in messages)


def _workers(settings: PrepareSettings) -> Workers:
    if not settings.output.ray:
        return InProcess()
    from preftree.prepare.cluster import Cluster

    return Cluster(settings.output.ray, settings.output.ray_workers, settings.output.ray_gpus)


# --- write ----------------------------------------------------------------------------------------


def _write(
    folder: PrepareFolder,
    settings: PrepareSettings,
    selection: Selection,
    generated: Generated,
    chat: Chat,
    say: Callable[[str], None],
) -> None:
    state = folder.state()
    rows = list(pairs(selection.rows, generated.kept, settings.generate, state["model"]["revision"]))
    if not rows:
        raise DataError("Not one answer was kept: see the reasons above. Change the sampling, in a new folder.")
    write_pairs(rows, folder.pairs)
    manifest = _manifest(folder, settings, selection, generated, state, len(rows))
    with atomic_file(folder.card) as file:
        file.write(card(manifest, _lengths(selection, generated, chat), folder.pairs.name).encode())
    write_manifest(manifest, folder.manifest)
    say(f"{folder.pairs}: {len(rows)} pairs. Beside it: manifest.yaml and README.md, the dataset card.")
    root = shlex.quote(str(folder.root))
    train = f"preftree train --model_name_or_path MODEL --dataset_name {root} --output_dir OUT"
    next_steps(say, f"preftree check {root}", train)
    say(f"To publish: hf upload --repo-type dataset NAME {folder.root} . --exclude '.prepare/*'")


def _manifest(
    folder: PrepareFolder,
    settings: PrepareSettings,
    selection: Selection,
    generated: Generated,
    state: dict[str, Any],
    count: int,
) -> dict[str, Any]:
    return {
        "source": {"name": settings.source.dataset_name, "xxh3_128_of_rows": selection.source_digest},
        "model": state["model"],
        "counts": {
            "source_rows": selection.source_rows,
            "removed": dict(sorted(selection.removed.items())),
            "strata": selection.strata,
            "examined": selection.examined,
            "rejected_candidates": dict(sorted(selection.rejected.items())),
            "selected": len(selection.rows),
            "answers_refused": dict(sorted(generated.refused.items())),
            "given_up": dict(sorted(generated.given_up.items())),
            "prompts_without_answer": sum(not answers for answers in generated.kept),
            "pairs": count,
        },
        "families": dict(sorted(Counter(row.family for row in selection.rows).items())),
        "teachers": dict(sorted(Counter(row.teacher for row in selection.rows).items())),
        "languages": _languages(selection),
        "settings": state["settings"],
        "environments": state["environments"],
        "file": {"name": folder.pairs.name, "sha256": hashlib.sha256(folder.pairs.read_bytes()).hexdigest()},
    }


def _languages(selection: Selection) -> dict[str, int]:
    """Language -> how many of some questions, spread evenly over all, are in it; those too short to tell left out."""
    some = selection.rows[:: -(-len(selection.rows) // LANGUAGE_SAMPLE)]
    counts = Counter(code for row in some if (code := language(row.question)))
    return dict(counts.most_common())


def _lengths(selection: Selection, generated: Generated, chat: Chat) -> dict[str, Sequence[int]]:
    both = [(row, answer) for row, answers in zip(selection.rows, generated.kept, strict=True) for answer in answers]
    ids = chat.tokenize({answer.text for _, answer in both})
    return {
        "prompt": [row.prompt_tokens for row, _ in both],
        "chosen": [row.chosen_tokens for row, _ in both],
        "rejected": [len(ids[answer.text]) for _, answer in both],
    }


# --- what it is made with -------------------------------------------------------------------------


def _environment(settings: PrepareSettings) -> dict[str, Any]:
    """What sampled tokens depend on beside the settings: versions, processor, threads."""
    found = environment()
    kept: dict[str, Any] = {"preftree": __version__}
    kept |= {name: found["versions"].get(name) for name in ("torch", "transformers", "tokenizers")}
    kept |= {"cpu": found["cpu"], "capability": found["cpu_capability"], "threads": torch.get_num_threads()}
    if settings.generate.engine == "openai":
        return {"preftree": kept["preftree"]}
    device = choose_device(settings.generate.device).value
    dtype = choose_dtype(device, settings.generate.torch_dtype).value
    return {**kept, "devices": found["devices"], "device": device, "dtype": str(dtype).removeprefix("torch.")}


def model_revision(settings: PrepareSettings) -> str | None:
    """The commit of a model on the hub, or a hash of a local folder's weights and configuration."""
    place = resolve(settings.generate.model_name_or_path or "")
    if place.local:
        return f"xxh3_128 {_hash_model(place)}"
    from transformers.utils.hub import cached_file, extract_commit_hash

    options = {"revision": settings.generate.model_revision, "cache_dir": settings.source.cache_dir}
    try:
        config = cached_file(place.place, "config.json", token=settings.source.auth, **options)
    except OSError:
        return None  # loading it will say why, in full
    return extract_commit_hash(config, None)


def _hash_model(place: ModelSource) -> str:
    digest = xxhash.xxh3_128()
    patterns = (place.gguf,) if place.gguf else ("*.json", "*.safetensors", "*.bin", "*.model", "*.gguf", "*.jinja")
    for path in sorted({path for pattern in patterns for path in Path(place.place).glob(pattern or "")}):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
