"""Progress speaks late, seldom, and about what is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from preftree.io import progress
from preftree.io.progress import Progress, clock


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_nothing_is_said_of_short_work(time: Clock) -> None:
    out = io.StringIO()
    report = Progress(Console(file=out), "reading ", "rows")
    for done in range(1, 11):
        time.now += 0.4
        report(done, 10)
    assert out.getvalue() == ""


def test_rate_and_time_left(time: Clock) -> None:
    out = io.StringIO()
    report = Progress(Console(file=out, width=100), "reading ", "rows")
    time.now += 10
    report(25, 100)
    time.now += 1
    report(26, 100)  # too soon
    assert out.getvalue() == "reading 25/100 rows, 2.5 per second, 0:30 left\n"


def test_on_a_terminal_one_line_is_rewritten_and_removed(time: Clock) -> None:
    out = io.StringIO()
    report = Progress(Console(file=out, force_terminal=True), "", "rows")
    time.now += 6
    report(3, 10)
    time.now += 1
    report(4, 10)
    report(10, 10)
    lines = out.getvalue().split("\r\x1b[2K")
    assert [line.split(" rows")[0] for line in lines] == ["", "3/10", "4/10", ""]


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3723, -5)] == ["0:00", "1:00", "1:01", "1:02:03", "0:00"]
