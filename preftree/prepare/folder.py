"""The output folder of a preparation: whose it is, what was asked for, how far it is.

OUTPUT_DIR/train.jsonl (or .parquet)    the pairs
OUTPUT_DIR/manifest.yaml                source, settings, counts; written last: with it, all is done
OUTPUT_DIR/README.md                    the dataset card
OUTPUT_DIR/.prepare/state.json          what was asked for, and with what it is made
OUTPUT_DIR/.prepare/selected.jsonl      the selection
OUTPUT_DIR/.prepare/answers.jsonl       the journal of answers
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftree.errors import RunError
from preftree.io.atomic import SUFFIX, write_json


class PrepareFolder:
    """The output folder of one preparation."""

    def __init__(self, output_dir: str, output_format: str) -> None:
        self.root = Path(output_dir)
        self.work = self.root / ".prepare"
        self.lock, self.state_path = self.work / "lock", self.work / "state.json"
        self.selected, self.answers = self.work / "selected.jsonl", self.work / "answers.jsonl"
        #: What is there before anything was selected, relative to the folder.
        self.bookkeeping = {str(path.relative_to(self.root)) for path in (self.lock, self.state_path)}
        self.pairs = self.root / f"train.{output_format}"
        self.manifest, self.card = self.root / "manifest.yaml", self.root / "README.md"

    def check(self) -> None:
        """Raise RunError where the folder is none, or holds what is not ours."""
        try:
            names = sorted(path.name for path in self.root.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error) from None
        if names and ".prepare" not in names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise RunError(
                f"--output_dir {self.root} holds other files ({shown}); nothing is written over. Give another folder."
            )

    def make(self) -> None:
        """Make the folder, where there is none. Raises RunError where that cannot be."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def remove_leftovers(self) -> None:
        """Delete what a killed process was writing; only under the lock."""
        for folder in (self.root, self.work):
            for leftover in folder.glob(f".*{SUFFIX}"):
                leftover.unlink(missing_ok=True)

    def _unusable(self, error: OSError) -> RunError:
        return RunError(f"--output_dir {self.root} cannot be used ({error.strerror}). Give another folder.")

    def claim(self, settings: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], environment: Any) -> bool:
        """Note what is asked for, or compare it with what was asked for earlier; returns whether an earlier run is
        continued. A run that did not come to select anything does not count: a corrected flag needs no new folder.

        Raises RunError, naming what differs, where the folder's run was asked for otherwise.
        """
        asked = json.loads(json.dumps({"settings": settings, "model": model}))
        earlier = self.state() if self.selected.exists() else {}
        if earlier:
            changed = _differences(earlier["settings"], asked["settings"])
            if earlier["model"] != asked["model"]:
                changed.append(f"the model was {earlier['model']}, now {asked['model']}")
            if changed:
                raise RunError(
                    f"The run in {self.root} began with other settings: {'; '.join(changed[:8])}. Repeat the flags it"
                    " began with, or give another --output_dir."
                )
        environments = earlier.get("environments", [])
        if environment not in environments:
            environments = [*environments, environment]
        write_json(self.state_path, {**asked, "environments": environments})
        return bool(earlier)

    def state(self) -> dict[str, Any]:
        """What `claim` has noted. Raises RunError where that cannot be read any more."""
        try:
            content = json.loads(self.state_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise damaged(self.state_path, error) from None
        if not isinstance(content, dict) or not {"settings", "model", "environments"} <= content.keys():
            raise damaged(self.state_path, ValueError("it does not hold settings, model and environments"))
        return content


def damaged(path: Path, error: Exception) -> RunError:
    """What to say of a file of ours that is not as it was written."""
    return RunError(f"{path} is damaged ({error}). Give another --output_dir, or delete this one's folder .prepare.")


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"--{key} was {earlier.get(group, {}).get(key)!r}, now {value!r}"
        for group, values in now.items()
        for key, value in values.items()
        if earlier.get(group, {}).get(key) != value
    ]
