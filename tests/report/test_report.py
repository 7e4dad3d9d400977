"""`preftree report` through the command: what is on the page, what can never be, and what it says of bad folders."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from preftree.cli import app
from preftree.config.train import parse_settings
from preftree.report import content
from preftree.report.charts import Line, line_chart, smoothed
from preftree.report.read import read_run, read_runs, short_names
from preftree.report.repeat import command_parts, train_command
from tests.report.conftest import HOSTILE, write_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def run_command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    return result.exit_code, result.output + result.stderr


class Page(HTMLParser):
    """Tags, attributes and text of a page; an element that is never closed is an error."""

    VOID = {"meta", "link", "br", "img", "path", "use", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.open = "", list[str]()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_page_with_everything_and_nothing_from_elsewhere(a_run: Path, scores: Path) -> None:
    code, said = run_command(a_run, "--compare", scores)
    assert code == 0, said
    text = (a_run / "report.html").read_text("utf-8")
    page = Page(text)
    assert {"script", "img"}.isdisjoint(page.tags)
    assert not [value for name, value in page.attributes if name.startswith("on") or name == "src"]
    assert {value for name, value in page.attributes if name == "href" and not str(value).startswith("#")} == {"data:,"}
    assert "http:" not in text
    assert "https:" not in text
    assert "url(http" not in text
    assert len(text.encode()) < 1_000_000
    for words in ("The run looks healthy", "In numbers", "Scores before and after", "Answers before and after",
                  "Smallest margins", "Largest margins", "pairs.jsonl:40", "abc123", "torch 2.13", "Accuracy",
                  "preftree train", "{{ 7 * 7 }}", "<script>alert(1)</script>", "40 pairs (d1d2)"):  # fmt: skip
        assert words in page.text, words
    assert "secret" not in text
    assert "\x1b" not in text
    assert page.tags.count("svg") >= 12
    assert len({v for n, v in page.attributes if n == "id"}) == len([v for n, v in page.attributes if n == "id"])


def test_differences_of_answers_are_marked(a_run: Path) -> None:
    run_command(a_run)
    text = (a_run / "report.html").read_text("utf-8")
    assert "<del>An old</del>" in text
    assert "<ins>A new</ins>" in text


def test_several_runs_share_their_charts(tmp_path: Path) -> None:
    first, second = write_run(tmp_path, "a"), write_run(tmp_path, "b", finished=False, objective={"max_steps": 600})
    code, _ = run_command(first, second, "--out", tmp_path / "both.html", "--title", "Two")
    text = (tmp_path / "both.html").read_text("utf-8")
    assert code == 0
    assert text.count("<figcaption>Loss</figcaption>") == 1
    assert "The run is not finished: step 60" in text


def test_curves_and_models_are_named_as_a_reader_would(tmp_path: Path, scores: Path) -> None:
    """One run: what each curve is; several: whose. A model of the table that is a run of this report has its name."""
    first, second = write_run(tmp_path, "a"), write_run(tmp_path, "b")
    keys = {chart.title: [label for label, _, _ in chart.keys] for chart in content.curves(read_runs([str(first)]))}
    assert keys["Loss"] == ["training", "held out"]
    assert keys["Rewards"] == ["chosen", "rejected"]
    assert keys["Speed"] == ["a"]
    both = read_runs([str(first), str(second)])
    loss = next(chart for chart in content.curves(both) if chart.title == "Loss")
    assert [label for label, _, _ in loss.keys] == ["a, training", "a, held out", "b, training", "b, held out"]
    assert content.run_name(f"{second}/", both) == "b"
    assert content.run_name("org/model", both) == "org/model"
    assert content.share_stderr({"accuracy": 0.5, "pairs": 101}) == pytest.approx(0.05)


def test_what_is_not_there_is_not_mentioned(a_run: Path, scores: Path) -> None:
    """An average of one task, smoothing of short curves, options of an adapter that are off, powers of ten."""
    run_command(a_run, "--compare", scores)
    text = (a_run / "report.html").read_text("utf-8")
    assert ">average<" not in text.partition("<h3>")[0]
    few = line_chart("x", [Line("a", [1, 2], [2.0, 30.0])], log=True)
    many = line_chart("x", [Line("a", list(range(30)), [1.0] * 30)])
    assert few is not None
    assert many is not None
    assert (few.smoothed, many.smoothed) == (False, True)
    assert "×" not in few.svg
    assert content._plain({"r": 16, "bias": None, "use_dora": False, "rank_pattern": {}}) == '{"r": 16}'
    parts = command_parts(read_run(a_run).settings)
    assert parts[0] == "preftree train"
    assert all(part.startswith("--") for part in parts[1:])
    assert not any(part.endswith(".0") for part in parts)


def test_markdown_has_the_same_and_no_markup_of_others(a_run: Path, scores: Path) -> None:
    code, _ = run_command(a_run, "--format", "md", "--compare", scores)
    text = (a_run / "report.md").read_text("utf-8")
    assert code == 0
    assert "The run looks healthy" in text
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<" not in outside
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert len(rows) > 15
    assert all(line.endswith("|") for line in rows)


def test_a_warning_is_named(tmp_path: Path) -> None:
    lengths = {"pairs": 60, "chosen": [90] * 60, "rejected": [30] * 60}
    run = write_run(tmp_path, lengths={"train": lengths})
    code, said = run_command(run)
    assert code == 0
    assert "Length explains the preferences" in said
    assert "chosen answers are longer" in (run / "report.html").read_text("utf-8")


def test_the_command_repeats_the_settings(a_run: Path) -> None:
    command = train_command(read_run(a_run).settings)
    assert "secret" not in command
    words = shlex.split(command)
    assert words[:2] == ["preftree", "train"]
    settings = parse_settings(words[2:])
    assert (settings.train.beta, settings.data.max_length, settings.train.device) == (0.2, 768, "cpu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "no training run here"),
        (lambda run: (run / "run/config.json").write_text("{"), "is damaged"),
        (lambda run: (run / "run/metrics.jsonl").write_text("[1]\n{\n{}\n"), "is damaged"),
        (lambda run: (run / "run/facts.json").write_text('{"lengths": {"train": {"x": 1}}}'), "is damaged"),
        (lambda run: (run / "run/examples.json").write_text('[{"set": 1}]'), "is damaged"),
        (lambda run: (run / "run/samples.jsonl").write_text('{"mode": "greedy"}\n'), "is damaged"),
    ],
)
def test_what_cannot_be_read_is_one_message(a_run: Path, damage: object, message: str) -> None:
    damage(a_run)  # type: ignore[operator]
    code, said = run_command(a_run)
    assert code == 2
    assert message in " ".join(said.split())
    assert "Traceback" not in said


def test_mistakes_are_one_message(a_run: Path, tmp_path: Path) -> None:
    for words, message in (
        ((), "name the run"),
        ((a_run, "--format", "pdf"), "--format must be one of html, md"),
        ((a_run, "--compare", tmp_path), "no compare.json here"),
        ((a_run, "--out", "/proc/x/report.html"), "cannot be written"),
    ):
        code, said = run_command(*words)
        assert code == 2
        assert message in " ".join(said.split())


def test_names_tell_runs_apart() -> None:
    assert short_names([Path("/o/a/run1")]) == ["run1"]
    assert short_names([Path("/o/a/x/run"), Path("/o/b/y/run")]) == ["a/x", "b/y"]
    assert short_names([Path("/o/a"), Path("/o/b")]) == ["a", "b"]
    assert short_names([Path("/o/a"), Path("/o/a/b")]) == ["a", "a/b"]


def test_smoothing_has_no_bias_at_the_start_and_gaps_are_left_out() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smoothed([1.0, 5.0]) == [1.0, 5.0]
    assert line_chart("x", [Line("a", [1, 2], [float("nan")] * 2)]) is None
    chart = line_chart("x", [Line("a", [1, 2, 3], [1.0, float("inf"), 2.0])])
    assert chart is not None
    assert chart.table == [["step", "a"], ["1", "1"], ["3", "2"]]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_errors(a_run: Path, tmp_path: Path, width: int) -> None:
    """A frame of the width in a page; its own script measures what would scroll sideways."""
    run_command(a_run)
    page = tmp_path / "frame.html"
    page.write_text(
        f'<iframe src="{(a_run / "report.html").as_uri()}" width="{width}" height="2000"></iframe><script>'
        "onload = () => { const d = document.querySelector('iframe').contentDocument;"
        " document.title = d ? d.documentElement.scrollWidth : 'unreadable'; }</script>"
    )
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    found = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in found.stderr
    title = re.search(r"<title>(\w+)</title>", found.stdout)
    assert title is not None, found.stderr[-2000:]
    assert 0 < int(title.group(1)) <= width


def test_hostile_texts_are_hostile() -> None:
    assert "<script>" in HOSTILE
    assert "\x1b" in HOSTILE
