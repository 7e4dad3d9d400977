"""An Ollama Modelfile with the model's own template, stop tokens and weights; read back before it is called done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from preftree.data.chat import Chat
from preftree.errors import RunError
from preftree.export.go_template import evaluate, go_template
from preftree.io.atomic import atomic_file

_TEMPLATE = re.compile(r'^TEMPLATE """(.*?)"""$', re.MULTILINE | re.DOTALL)


def write_modelfile(folder: Path, weights: str, chat: Chat, stops: Sequence[str]) -> None:
    """Write `Modelfile` into a folder.

    Args:
        weights: what FROM names, relative to the folder.
        stops: texts that end an answer.

    Raises:
        ModelError: the chat template cannot be written in Ollama's language.
        RunError: the file does not read back as what was meant.
    """
    template = go_template(chat)
    lines = [f"FROM {weights}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops), ""]
    with atomic_file(folder / "Modelfile", "w") as file:
        file.write("\n".join(lines))
    read = _TEMPLATE.search((folder / "Modelfile").read_text(encoding="utf-8"))
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    if read is None or evaluate(read[1], messages) != evaluate(template, messages) or '"""' in template:
        raise RunError("the chat template does not survive being written into a Modelfile")
