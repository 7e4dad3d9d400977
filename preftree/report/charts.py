"""Charts as SVG by matplotlib, with colours that follow the page: light, dark and printed.

matplotlib writes sentinel colours, which are replaced by the page's CSS variables. Texts stay texts, so that they are
readable on a phone, searchable, and take the page's font. No script is needed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

#: Inches at 72 points: 352 × 220 CSS pixels, near the width of a phone, so that texts keep their size there.
_SIZE = (4.9, 3.05)
_INK, _LINE = "#010203", "#010204"
#: Sentinel colours of the series, in the order of runs.
_SERIES = tuple(f"#0102{index:02x}" for index in range(0x10, 0x18))
_VARIABLES = {_INK: "var(--soft)", _LINE: "var(--line)"} | {c: f"var(--s{i})" for i, c in enumerate(_SERIES)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "axes.unicode_minus": True,
}
#: Points of a curve that are drawn; a smoothed one is the mean over about this share of all its points.
_POINTS, _SMOOTHED_SHARE = 600, 0.06
#: Curves of fewer points are drawn as they are.
_FEW = 24


@dataclass(frozen=True)
class Line:
    """One curve: points with finite values are drawn.

    Args:
        color: index of the series' colour.
        dashed: of two curves of a run, the second one.
        noisy: smooth it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dashed: bool = False
    noisy: bool = True

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it.

    Args:
        svg: the drawing.
        keys: what is drawn: label, index of the colour, dashed.
        table: the heading, then rows of numbers, for who cannot see it.
        smoothed: are there thick curves in front of thin ones, as they were logged?
    """

    title: str
    svg: str
    keys: list[tuple[str, int, bool]] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    smoothed: bool = False


def line_chart(title: str, lines: Sequence[Line], y_label: str = "", log: bool = False) -> Chart | None:
    """Curves over steps, noisy ones smoothed in front of the raw values; None where there is nothing to draw."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for line in drawn:
            points = _thinned(line.points)
            x, y = [p[0] for p in points], [p[1] for p in points]
            style: dict[str, Any] = {
                "color": _SERIES[line.color % len(_SERIES)],
                "linestyle": "--" if line.dashed else "-",
            }
            long = _is_smoothed(line)
            raw: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.4} if long else {"linewidth": 1.6}
            raw |= {"marker": "o", "markersize": 3} if len(points) < _FEW // 2 else {}
            axes.plot(x, y, **raw, **style)
            if long:
                axes.plot(x, smoothed(y), linewidth=1.7, **style)
        if log and all(value > 0 for line in drawn for _, value in line.points):
            axes.set_yscale("log")
            for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                ticks(LogFormatter(minor_thresholds=(1.5, 0.5)))  # 2 and 30 instead of powers of ten
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)

    keys = [(line.label, line.color, line.dashed) for line in drawn]
    return Chart(title, _svg(title, draw), keys, _table(drawn), any(map(_is_smoothed, drawn)))


def histogram_chart(title: str, series: Sequence[tuple[str, Sequence[float], int]], x_label: str) -> Chart | None:
    """Distributions in common bins between the 0.5th and the 99.5th percentile.

    Args:
        series: label, values, index of the colour.
    """
    shown = [(label, [v for v in values if math.isfinite(v)], color) for label, values, color in series]
    shown = [each for each in shown if each[1]]
    if not shown:
        return None
    everything = sorted(value for _, values, _ in shown for value in values)
    low, high = (
        everything[int(0.005 * len(everything))],
        everything[min(int(0.995 * len(everything)), len(everything) - 1)],
    )
    high = high if high > low else low + 1
    bins = min(40, max(8, int(math.sqrt(len(everything)))))

    def draw(axes: Axes) -> None:
        for _, values, color in shown:
            inside = [min(max(value, low), high) for value in values]
            axes.hist(inside, bins=bins, range=(low, high), histtype="stepfilled", color=_SERIES[color], alpha=0.22)
            axes.hist(inside, bins=bins, range=(low, high), histtype="step", color=_SERIES[color], linewidth=1.5)
        if low < 0 < high:
            axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel(x_label)
        axes.set_ylabel("pairs")

    table = [["", "smallest", "median", "mean", "largest"]]
    for label, values, _ in shown:
        ordered = sorted(values)
        numbers = (ordered[0], ordered[len(ordered) // 2], sum(ordered) / len(ordered), ordered[-1])
        table.append([label, *(f"{number:.4g}" for number in numbers)])
    return Chart(title, _svg(title, draw), [(label, color, False) for label, _, color in shown], table)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without a bias towards its start."""
    keep = 1 - 1 / max(1.0, _SMOOTHED_SHARE * len(values))
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        found.append(total / weight)
    return found


def _is_smoothed(line: Line) -> bool:
    return line.noisy and len(line.points) >= _FEW


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` points: means of neighbours."""
    size = math.ceil(len(points) / _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _table(lines: Sequence[Line]) -> list[list[str]]:
    """About ten rows of a chart's numbers."""
    steps = sorted({x for line in lines for x, _ in line.points})
    every = max(1, math.ceil(len(steps) / 10))
    kept = sorted({*steps[::every], steps[-1]})
    columns = [dict(line.points) for line in lines]
    rows = [["step", *(line.label for line in lines)]]
    return rows + [[f"{x:g}", *(f"{c[x]:.4g}" if x in c else "" for c in columns)] for x in kept]


def _svg(title: str, draw: object) -> str:
    assert callable(draw)
    style: Any = {**_STYLE, "svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue())


def _inline(text: str) -> str:
    """An SVG file as an element of a page: no prolog, no metadata, only ids that are used, colours of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found.group() if found.group(1) in used else "", text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r"<style.*?</style>|font-family: [^;]*; ", "", text, flags=re.DOTALL)  # the page has its own
    text = text.replace("xlink:href", "href")
    for sentinel, variable in _VARIABLES.items():
        text = text.replace(sentinel, variable)
    return re.sub(r"\n\s*", "\n", text).strip()
