"""Texts of the data that are commands elsewhere: terminal escapes, markup, HTML, Markdown. Shown, never obeyed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from preftree.check.run import main as check
from preftree.cli import guarded
from preftree.io.console import sayer, visible
from preftree.prepare.card import card

ESCAPE = "\x1b[31mred\x1b]0;title\x07\r\x9b2J"
TURNED = "\u202egpj.exe"
HALF = "\ud83d"
MARKUP = "[bold red]x[/] [/nope] [link=http://x]y[/link]"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;"
MARKDOWN = "| a ` b | [x](http://y) <b>\n# head"
HOSTILE = f"{ESCAPE}{TURNED}{HALF}{MARKUP}{HTML}{MARKDOWN}"
COMMANDS = "\x1b\x07\r\x9b\u202e\ud83d"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert visible("\x1b[31m\x00\x7f\x9b\r\u202e\ud83d") == r"\x1b[31m\x00\x7f\x9b\r\u202e\ud83d"
    kept = "plain\ttext\nof two lines: é 中文 🙂 עברית"
    assert visible(kept) == kept
    file = io.StringIO()
    sayer(Console(file=file, force_terminal=True, color_system="truecolor", width=40))(HOSTILE)
    said = file.getvalue()
    assert not set(COMMANDS) & set(said)
    for shown in (MARKUP, HTML, r"\x1b[31mred"):
        assert shown in said


def rows() -> list[dict[str, Any]]:
    """Rows that bring every finding and every message whose words hold something of theirs."""
    good = {"prompt": HOSTILE, "chosen": f"yes {HOSTILE}", "rejected": f"no {HOSTILE}", HOSTILE: HOSTILE}
    return [
        good,
        good,
        {**good, "chosen": good["rejected"], "rejected": good["chosen"]},
        {**good, "chosen": [{"role": HOSTILE, "content": HOSTILE}]},
        {**good, "chosen": [{HOSTILE: "assistant", "content": 5}]},
        {HOSTILE: 1, "prompt": "x"},
        {**good, "chosen": {"a": HOSTILE}},
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_check_shows_and_does_not_obey(tmp_path: Path, terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    name = "evil\x1b[31m [red]<b>`|.jsonl"
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows()))
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=100)
    html = tmp_path / "report.html"
    assert check([str(tmp_path / name), "--html", str(html)], console) == 1
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert not set(COMMANDS) & set(said)
    assert r"evil\x1b[31m [red]<b>`|.jsonl" in said
    page = html.read_text(encoding="utf-8")
    assert not set(COMMANDS) & set(page)
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>`" not in page
    # For machines the name is the name.
    assert check([str(tmp_path / name), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == str(tmp_path / name)


def test_errors_show_and_do_not_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({HOSTILE: 1, "chosn": "x"}) + "\n")
    assert guarded(lambda: check([str(tmp_path / "a.jsonl")])) == 2
    assert guarded(lambda: check([f"{tmp_path}/{ESCAPE}{MARKUP}.jsonl"])) == 2
    assert guarded(lambda: check([str(tmp_path / "a.jsonl"), f"--{ESCAPE}", HOSTILE])) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 3
    assert not set(COMMANDS) & set(said)
    assert MARKUP in said


def test_the_card_holds_names_as_code(tmp_path: Path) -> None:
    """The card has no text of the rows in it; the names of source and model come from outside."""
    counts = {"source_rows": 3, "removed": {}, "examined": 3, "rejected_candidates": {}, "strata": 1, "selected": 3}
    evil = f"{MARKDOWN}{HTML}"
    manifest = {
        "source": {"name": evil},
        "model": {"name": evil, "revision": None},
        "languages": {"en": 3},
        "counts": {**counts, "given_up": {}, "pairs": 3},
        "settings": {
            "select": {"decontaminate": None, "seed": 1},
            "generate": {
                **dict.fromkeys(("temperature", "top_p", "top_k", "max_new_tokens"), 1),
                "engine": "openai",
                "cut_answers": "trim",
            },
        },
    }
    text = card(manifest, {name: [1, 2] for name in ("prompt", "chosen", "rejected")}, "train.jsonl")
    assert yaml.safe_load(text.split("---")[1])
    for line in text.splitlines():
        plain = "".join(line.replace("\\|", "").split("`")[::2])  # what stands outside of code spans
        assert "<script" not in plain
        assert "](" not in plain
        assert not line.startswith("# head")
        assert line.startswith("```") or line.count("`") % 2 == 0
