"""`preftree train --resume RUN`: the settings of a run that is gone on with come from its own folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from preftree.config.parser import FlagParser


def with_own_settings(argv: Sequence[str], parser: FlagParser) -> list[str]:
    """The command line that repeats the run which `--resume` names, with what `argv` adds to it.

    A run is named by its output folder or one of its checkpoints. Anything else, such as a checkpoint to go on from
    in another output folder, is left as it is. The same command goes on by itself, so for an output folder no
    checkpoint is asked for.
    """
    parsed = parser.parse(argv)
    asked = parsed.values["resume_from_checkpoint"]
    if not isinstance(asked, str) or any(name in parsed.given for name in ("output_dir", "dataset_name")):
        return list(argv)
    place = Path(asked)
    run = next((folder for folder in (place, place.parent) if (folder / "run" / "config.json").is_file()), None)
    if run is None:
        return list(argv)
    words = [str(run / "run" / "config.json"), *argv, "--output_dir", str(run)]
    if "overwrite_output_dir" not in parsed.given:
        words += ["--overwrite_output_dir", "false"]  # the run itself may have begun by overwriting
    return [*words, "--resume_from_checkpoint", "false"] if run == place else words
