"""Foreign text in Markdown: shown as it is, never obeyed."""

from __future__ import annotations

import html
import re

from preftree.io.console import visible

_MARKUP = re.compile(r"([\\`*_\[\]#|~])")


def cell(text: str, room: int = 200) -> str:
    """A text as one line without markup or HTML, cut to `room` characters."""
    flat = " ".join(visible(text).split())
    flat = flat if len(flat) <= room else flat[: room - 1] + "…"
    return _MARKUP.sub(r"\\\1", html.escape(flat, quote=False))
