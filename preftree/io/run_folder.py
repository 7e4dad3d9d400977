"""The run folder: what a stage leaves for the next one and for reports.

    OUTPUT_DIR/run/config.json     the settings and their fingerprint
    OUTPUT_DIR/run/env.json        machine and versions
    OUTPUT_DIR/run/metrics.jsonl   one record a line, flushed as it is written
    OUTPUT_DIR/run/samples.jsonl   prompts and answers, one a line

JSON files are replaced in one piece, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from preftree.errors import RunError
from preftree.io.atomic import write_json
from preftree.io.jsonl import append_jsonl, read_jsonl, to_json
from preftree.io.lock import folder_lock

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_RESULTS = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json")
#: Names that a training run writes beside its `run` folder.
_WRITTEN = re.compile(
    r"README\.md|(adapter_|model|pytorch_model|tokenizer|vocab|spiece|sentencepiece).*|merges\.txt|chat_template.*"
    r"|(added_tokens|special_tokens_map|config|generation_config|trainer_state)\.json|training_args\.bin|checkpoint-\d+"
)
_LOCK = ".lock"


class RunFolder:
    """The run folder of one output folder. With several ranks only the first one writes: see `claim`."""

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / "run"
        self.config_path = self.folder / "config.json"
        self.env_path = self.folder / "env.json"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.samples_path = self.folder / "samples.jsonl"

    def check(
        self, *, resume: bool, overwrite: bool, fingerprint: str, config: Mapping[str, Any] | None = None
    ) -> None:
        """Raise RunError where `claim` would, or where the folder cannot be written; nothing is left there."""
        found = self._contents()
        self._check_writable()
        if not found:
            return
        earlier = self._earlier()
        if resume:
            self._check_same_settings(earlier, fingerprint, config)
        elif earlier:
            if not overwrite and (self._has_results() or set(found) != {"run"}):
                raise self._occupied(
                    "another run",
                    found,
                    "Give another folder, continue that run by --resume_from_checkpoint, or replace it by"
                    " --overwrite_output_dir.",
                )
        elif ours := [name for name in found if _WRITTEN.fullmatch(name)]:
            raise self._occupied("files of the same names that are not of a run here", ours, "Give another folder.")
        elif not overwrite:
            raise self._occupied(
                "other files",
                found,
                "Give another folder, or add --overwrite_output_dir: they are kept, and none of them has a name that"
                " training writes.",
            )

    def _occupied(self, what: str, names: list[str], advice: str) -> RunError:
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        return RunError(f"--output_dir {self.output_dir} holds {what} ({shown}); nothing is overwritten. {advice}")

    def _check_writable(self) -> None:
        """Make a file without a name where the folder is or would be."""
        place = next(path for path in (self.output_dir, *self.output_dir.absolute().parents) if path.is_dir())
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise RunError(
                f"--output_dir {self.output_dir} cannot be written ({error.strerror or error}). Give another folder."
            ) from None

    def held(self) -> AbstractContextManager[None]:
        """A lock on the output folder for a block; a kill releases it. Raises RunError where another run holds it."""
        return folder_lock(self.output_dir / _LOCK, self.output_dir)

    def claim(
        self, *, resume: bool, overwrite: bool, fingerprint: str, config: Mapping[str, Any] | None = None
    ) -> None:
        """Make the folder this run's own and write config.json. Only the first rank calls it.

        Raises RunError when the folder holds another run or other files and neither `resume` nor `overwrite`
        is set, and when `resume` meets settings of another fingerprint. A run that never logged anything does
        not count, so that whoever corrects a flag can start again at once. `overwrite` deletes what an earlier
        run of ours left (run/, checkpoints, results) and no other file.
        """
        self.check(resume=resume, overwrite=overwrite, fingerprint=fingerprint, config=config)
        if self._earlier() and not resume:
            self._delete_earlier()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.config_path, {"fingerprint": fingerprint, "settings": dict(config or {})})

    def write_env(self, environment: Mapping[str, Any]) -> None:
        """Write env.json."""
        write_json(self.env_path, environment)

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
        try:
            content = json.loads(self.config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _has_results(self) -> bool:
        logged = any(path.exists() and path.stat().st_size for path in (self.metrics_path, self.samples_path))
        return logged or any(_CHECKPOINT.fullmatch(name) or name in _RESULTS for name in self._contents())

    def _check_same_settings(
        self, earlier: Mapping[str, Any], fingerprint: str, config: Mapping[str, Any] | None
    ) -> None:
        if not earlier or earlier.get("fingerprint") == fingerprint:
            return
        changed = [
            f"--{key} was {_get(earlier.get('settings'), group, key)!r}, now {value!r}"
            for group, values in (config or {}).items()
            for key, value in (values.items() if isinstance(values, Mapping) else ())
            if _get(earlier.get("settings"), group, key) != value
            and key not in ("resume_from_checkpoint", "output_dir")
        ]
        raise RunError(
            f"--resume_from_checkpoint: the run in {self.output_dir} began with other settings"
            f"{': ' + '; '.join(changed[:8]) if changed else ''}. Repeat the flags it began with, or start a"
            " new run in another folder."
        )

    def _delete_earlier(self) -> None:
        """Delete what a run of ours wrote; called only when run/config.json says that there was one."""
        shutil.rmtree(self.folder)
        for path in self.output_dir.iterdir():
            if _CHECKPOINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name in _RESULTS:
                path.unlink()


def _get(settings: Any, group: str, key: str) -> Any:
    values = settings.get(group) if isinstance(settings, Mapping) else None
    return values.get(key) if isinstance(values, Mapping) else None


def make_folder(flag: str, folder: str) -> Path:
    """Make the folder that `flag` names, where there is none. Raises RunError where that cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RunError(f"{flag} {folder} cannot be made: {problem.strerror}. Give another folder.") from problem
    return path
