"""Answers side by side: on a terminal, and as one HTML file without scripts, every text escaped."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from preftree.io.atomic import atomic_file
from preftree.io.console import visible
from preftree.io.html import html_templates
from preftree.samples.opened import OpenRun
from preftree.text.differences import AnswerRow, Piece

#: Style of the words that only this side has.
_STYLES = {"base": "red", "trained": "green"}


def show_rows(console: Console, rows: Sequence[AnswerRow]) -> None:
    """Print one table per prompt, the base's answer on the left."""
    for number, row in enumerate(rows, start=1):
        title = Text(f"{number}. {visible(row.prompt)}", style="bold")
        table = Table(title=title, title_justify="left", show_lines=True, expand=True)
        for heading in ("base", "trained" if row.changed else "trained (the same)"):
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(styled(row.before, "base"), styled(row.after, "trained"))
        console.print(table, soft_wrap=False)
        console.print()


def styled(pieces: Sequence[Piece], side: str) -> Text:
    """An answer with what differs in colour and underlined, which is seen without colour too."""
    text = Text()
    for piece in pieces:
        text.append(visible(piece.text), style=f"{_STYLES[side]} underline" if piece.changed else "")
    return text


def write_rows_html(path: Path, opened: OpenRun, rows: Sequence[AnswerRow]) -> None:
    """Write the table as an HTML file."""
    text = (
        html_templates("preftree.samples")
        .get_template("samples.html.j2")
        .render(
            run=str(opened.run.folder),
            base=opened.run.base_name,
            rows=rows,
            changed=sum(row.changed for row in rows),
            drawn=how_drawn(opened),
            date=datetime.date.today().isoformat(),
        )
    )
    with atomic_file(path, "w") as file:
        file.write(text)


def how_drawn(opened: OpenRun) -> str:
    """How tokens were drawn, in words."""
    sampling = opened.decoding.sampling
    if sampling.temperature == 0:
        return "greedy"
    more = f", top_p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    more += f", top_k {sampling.top_k}" if sampling.top_k else ""
    return f"temperature {sampling.temperature:g}{more}, seed {opened.seed}"
