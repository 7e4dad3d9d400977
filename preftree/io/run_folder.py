"""The run folder: what a stage leaves for the next one and for reports.

    OUTPUT_DIR/run/config.json     the settings and their fingerprint
    OUTPUT_DIR/run/identity.json   what makes the run this very run, by content
    OUTPUT_DIR/run/env.json        machine and versions
    OUTPUT_DIR/run/data.json       what was read, kept and found in the data
    OUTPUT_DIR/run/metrics.jsonl   one record per line, flushed as it is written
    OUTPUT_DIR/run/samples.jsonl   prompts and answers, one per line
    OUTPUT_DIR/run/facts.json      objective, lengths of the pairs in tokens, what was said of the data
    OUTPUT_DIR/run/pairs.jsonl     implicit rewards of single pairs, one record per log line and set
    OUTPUT_DIR/run/examples.json   the pairs with the smallest and the largest margins, as texts
    OUTPUT_DIR/run/votes.jsonl     preference pairs voted for in `preftree chat`
    OUTPUT_DIR/run/finished.json   the last step, once everything else is there

JSON files are replaced in one piece, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftree.errors import RunError
from preftree.io.atomic import atomic_file, write_json
from preftree.io.jsonl import append_jsonl, json_line, read_jsonl, read_object, to_json
from preftree.io.lock import folder_lock, removed_if_unused

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_RESULTS = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json")
#: Names that a training run writes beside its `run` folder.
_WRITTEN = re.compile(
    r"README\.md|(adapter_|model|pytorch_model|tokenizer|vocab|spiece|sentencepiece).*|merges\.txt|chat_template.*"
    r"|(added_tokens|special_tokens_map|config|generation_config|trainer_state)\.json|training_args\.bin|checkpoint-\d+"
)
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors")
_LOCK = ".lock"
#: Bytes that an output folder's disk must have: a little more than the files of settings.
_LEAST_ROOM = 1 << 16


class RunFolder:
    """The run folder of one output folder. With several ranks only the first one writes: see `claim`."""

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / "run"
        self.config_path = self.folder / "config.json"
        self.identity_path = self.folder / "identity.json"
        self.env_path = self.folder / "env.json"
        self.data_path = self.folder / "data.json"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.samples_path = self.folder / "samples.jsonl"
        self.facts_path = self.folder / "facts.json"
        self.pairs_path = self.folder / "pairs.jsonl"
        self.examples_path = self.folder / "examples.json"
        self.finished_path = self.folder / "finished.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """A lock on the output folder for a block; a kill releases it.

        A folder that was made for the lock alone is removed afterwards.

        Raises:
            RunError: another run holds it.
        """
        with removed_if_unused(self.output_dir, {_LOCK}), folder_lock(self.output_dir / _LOCK, self.output_dir):
            yield

    def check(
        self, *, resume: bool, overwrite: bool, fingerprint: str, config: Mapping[str, Any] | None = None
    ) -> None:
        """Raise RunError where `claim` would for these settings, or where nothing can be written; nothing is left.

        Args:
            resume: a checkpoint was asked for, which says itself what run it is of.
            overwrite: delete what an earlier run left here.
            fingerprint: of the settings that have an effect.
            config: all settings by group, for the message.
        """
        found = self._contents()
        self._check_writable()
        earlier = self._earlier()
        if earlier:
            if not overwrite and earlier.get("fingerprint") != fingerprint and self._has_results():
                raise self._other_run(_setting_differences(earlier.get("settings"), config))
        elif resume or found in ([], ["run"]):
            return
        elif ours := [name for name in found if _WRITTEN.fullmatch(name)]:
            raise self._occupied("files of the same names that are not of a run here", ours, "Give another folder.")
        elif not overwrite:
            advice = (
                "Give another folder, or add --overwrite_output_dir true: they are kept, and none of them has a name"
            )
            raise self._occupied("other files", found, f"{advice} that training writes.")

    def claim(
        self,
        *,
        resume: bool,
        overwrite: bool,
        fingerprint: str,
        config: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make the folder this run's own; returns whether this very run was begun here before.

        Only the first rank calls it. A run that never logged anything does not count as one: after a flag was fixed
        the command starts without further ado. `overwrite` deletes what an earlier run of ours left (run/,
        checkpoints, results) and no other file.

        Args:
            identity: facts about data, weights and objective; see `check` for the others.

        Raises:
            RunError: the folder holds another run or other files, with all differences.
        """
        self.check(resume=resume, overwrite=overwrite, fingerprint=fingerprint, config=config)
        earlier = self._earlier()
        known = read_object(self.identity_path)
        differing = fact_differences(known, identity or {}) if known else []
        if not overwrite and differing and self._has_results():
            raise self._other_run(differing)
        same = bool(earlier) and not overwrite and not differing and earlier.get("fingerprint") == fingerprint
        if earlier and not same:
            self._delete_earlier()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.config_path, {"fingerprint": fingerprint, "settings": dict(config or {})})
        write_json(self.identity_path, dict(identity or {}))
        return same

    def finish(self, step: int) -> None:
        """Say that everything is there; the last thing a run writes."""
        write_json(self.finished_path, {"step": step})

    def finished(self) -> int | None:
        """The last step of a run that is complete here, else None."""
        step = read_object(self.finished_path).get("step")
        whole = any(_WEIGHTS.fullmatch(name) for name in self._contents())
        return step if isinstance(step, int) and whole else None

    def reset_metrics(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl by the records of the checkpoint that the run goes on from."""
        self._replace(self.metrics_path, records)

    def reset_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Replace samples.jsonl by the records of the checkpoint that the run goes on from."""
        self._replace(self.samples_path, samples)

    def reset_pairs(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace pairs.jsonl by the records of the checkpoint that the run goes on from."""
        self._replace(self.pairs_path, records)

    def _replace(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        with atomic_file(path, "w") as file:
            for record in records:
                file.write(json_line(record))

    def write_env(self, environment: Mapping[str, Any]) -> None:
        """Write env.json."""
        write_json(self.env_path, environment)

    def write_data(self, facts: Mapping[str, Any]) -> None:
        """Write data.json."""
        write_json(self.data_path, facts)

    def data(self) -> dict[str, Any]:
        """The content of data.json, empty where there is none."""
        return read_object(self.data_path)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        append_jsonl(self.metrics_path, to_json(record))

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append one record to samples.jsonl."""
        append_jsonl(self.samples_path, to_json(record))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl, without a line that a kill tore."""
        yield from read_jsonl(self.metrics_path)

    def samples(self) -> Iterator[dict[str, Any]]:
        """The records of samples.jsonl, without a line that a kill tore."""
        yield from read_jsonl(self.samples_path)

    def _contents(self) -> list[str]:
        """Names in the output folder, the run folder first; raises RunError when it cannot be one."""
        try:
            names = sorted(path.name for path in self.output_dir.iterdir())
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise RunError(f"--output_dir {self.output_dir} is a file. Give a folder.") from None
        except PermissionError:
            raise RunError(f"--output_dir {self.output_dir} cannot be read. Give a folder of your own.") from None
        return sorted((name for name in names if name != _LOCK), key=lambda name: name != "run")

    def _earlier(self) -> dict[str, Any]:
        """config.json of the run that is there, or an empty dict."""
        return read_object(self.config_path)

    def _has_results(self) -> bool:
        logged = any(path.exists() and path.stat().st_size for path in (self.metrics_path, self.samples_path))
        return logged or any(_CHECKPOINT.fullmatch(name) or name in _RESULTS for name in self._contents())

    def _other_run(self, differing: list[str]) -> RunError:
        """The error for a folder of another run, with how it differs."""
        return RunError(
            f"--output_dir {self.output_dir} holds another run, and nothing is overwritten:{listed(differing)}\n"
            "Repeat the command that it began with to go on with it, give another folder, or replace it by "
            "--overwrite_output_dir true."
        )

    def _occupied(self, what: str, names: list[str], advice: str) -> RunError:
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        return RunError(f"--output_dir {self.output_dir} holds {what} ({shown}); nothing is overwritten. {advice}")

    def _check_writable(self) -> None:
        """Make a file without a name where the folder is or would be, as large as the settings."""
        place = next(path for path in (self.output_dir, *self.output_dir.absolute().parents) if path.is_dir())
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(_LEAST_ROOM))
                file.flush()
        except OSError as error:
            raise RunError(
                f"--output_dir {self.output_dir} cannot be written ({error.strerror or error}). Make room there, or "
                "give another folder."
            ) from None

    def _delete_earlier(self) -> None:
        """Delete what a run of ours wrote; called only when run/config.json says that there was one."""
        shutil.rmtree(self.folder)
        for path in self.output_dir.iterdir():
            if _CHECKPOINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name in _RESULTS:
                path.unlink()


def fact_differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How facts of an earlier run differ from those of this one, one phrase per fact."""
    return [
        f"{name} was {_shown(earlier.get(name))}, now {_shown(now.get(name))}"
        for name in dict.fromkeys([*now, *earlier])
        if earlier.get(name) != now.get(name)
    ]


def listed(differences: list[str], most: int = 12) -> str:
    """Differences as lines of a message."""
    lines = "".join(f"\n  - {difference}" for difference in differences[:most])
    return lines + (f"\n  … and {len(differences) - most} more" if len(differences) > most else "")


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _setting_differences(earlier: Any, config: Mapping[str, Any] | None) -> list[str]:
    before, now = (
        {f"--{k}": v for group in _groups(settings) for k, v in group.items()} for settings in (earlier, config)
    )
    for facts in (before, now):
        for name in ("--resume_from_checkpoint", "--output_dir", "--overwrite_output_dir"):
            facts.pop(name, None)
    return fact_differences(before, now)


def _groups(settings: Any) -> list[Mapping[str, Any]]:
    values = settings.values() if isinstance(settings, Mapping) else ()
    return [group for group in values if isinstance(group, Mapping)]


def free_space(path: str | Path) -> int:
    """Bytes that are free where `path` is, or would be made."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free


def make_folder(flag: str, folder: str) -> Path:
    """Make the folder that `flag` names, where there is none. Raises RunError where that cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RunError(f"{flag} {folder} cannot be made: {problem.strerror}. Give another folder.") from problem
    return path
