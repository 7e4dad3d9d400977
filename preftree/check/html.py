"""The report as one HTML file: no script, nothing loaded from elsewhere, every text escaped by the template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from preftree.check.report import FINE, NOTE, SPOILS, Histogram, Report
from preftree.check.views import counted, percent, row_list, token_count
from preftree.io.atomic import atomic_file
from preftree.io.html import html_templates

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _TICK = 640, 220, 8, 26, 8, 100

#: Characters of a sample row's text that are shown.
EXCERPT = 700

_COLORS = {"prompt": 0, "chosen": 1, "rejected": 2}


@dataclass(frozen=True)
class Curve:
    """One series of a histogram as an SVG path: its name, the path's data, its colour."""

    name: str
    path: str
    color: int


@dataclass(frozen=True)
class Picture:
    """A histogram laid out for SVG; `ticks` are (x, label), `most` is the largest count, `zero`
    the place of 0."""

    title: str
    unit: str
    curves: list[Curve]
    ticks: list[tuple[float, str]]
    most: int
    zero: float
    width: int = _WIDTH
    height: int = _HEIGHT
    floor: int = _HEIGHT - _BOTTOM


def write_html(report: Report, path: Path) -> None:
    """Write the report."""
    environment = html_templates("preftree.check")
    environment.filters["percent"] = percent
    environment.filters["counted"] = counted
    environment.filters["row_list"] = row_list
    environment.filters["token_count"] = token_count
    text = environment.get_template("report.html.j2").render(
        report=report,
        found=report.of(SPOILS, NOTE),
        fine=report.of(FINE),
        skipped=report.skipped(),
        one_file=len(report.files) == 1,
        spoils=len(report.of(SPOILS)),
        notes=len(report.of(NOTE)),
        excerpt=EXCERPT,
        pictures=[picture(histogram) for histogram in report.histograms],
    )
    with atomic_file(path, "w") as file:
        file.write(text)


def picture(histogram: Histogram) -> Picture:
    """Steps in common coordinates, the largest count at the top."""
    most = max((max(counts) for counts in histogram.counts.values()), default=0) or 1
    low, high = histogram.edges[0], histogram.edges[-1]

    def x(value: float) -> float:
        return round(_LEFT + (_WIDTH - 2 * _LEFT) * (value - low) / (high - low), 1)

    def y(count: int) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * count / most, 1)

    curves = []
    for index, (name, counts) in enumerate(histogram.counts.items()):
        steps = [f"V{y(count)}H{x(right)}" for count, right in zip(counts, histogram.edges[1:], strict=True)]
        color = _COLORS.get(name, index)
        curves.append(Curve(name, f"M{x(low)},{y(0)}{''.join(steps)}V{y(0)}Z", color))
    every = max(len(histogram.edges) // 6, 1)
    inner = [edge for edge in histogram.edges[every:-every] if round(edge / (histogram.edges[1] - low)) % every == 0]
    inner = [edge for edge in inner if x(high) - x(edge) > _TICK]  # room for the last label
    ticks = [(x(low), f"≤ {low:,.0f}" if low < 0 else f"{low:,.0f}"), *((x(edge), f"{edge:,.0f}") for edge in inner)]
    return Picture(histogram.title, histogram.unit, curves, [*ticks, (x(high), f"≥ {high:,.0f}")], most, x(0))
