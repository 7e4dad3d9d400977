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
from preftree.prepare.journal import whole_file


class Folder:
    """The output folder of one preparation."""

    def __init__(self, output_dir: str, output_format: str) -> None:
        self.root = Path(output_dir)
        self.work = self.root / ".prepare"
        self.lock, self.state_path = self.work / "lock", self.work / "state.json"
        self.selected, self.answers = self.work / "selected.jsonl", self.work / "answers.jsonl"
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

    def _unusable(self, error: OSError) -> RunError:
        return RunError(f"--output_dir {self.root} cannot be used ({error.strerror}). Give another folder.")

    def claim(self, settings: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], environment: Any) -> bool:
        """Note what is asked for, or compare it with what was; whether an earlier run is gone on with. A run that
        did not come to select anything does not count: whoever mends a flag starts again without further ado.

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
        with whole_file(self.state_path) as file:
            text = json.dumps({**asked, "environments": environments}, indent=2, ensure_ascii=False)
            file.write(text.encode(errors="backslashreplace") + b"\n")  # names of files need not be valid text
        return bool(earlier)

    def state(self) -> dict[str, Any]:
        """What state.json says; empty where there is none."""
        try:
            content = json.loads(self.state_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise damaged(self.state_path, error) from None
        return dict(content)


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
