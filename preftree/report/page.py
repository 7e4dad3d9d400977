"""The report as one HTML file: no network, every text escaped by the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment

from preftree import __version__
from preftree.health.findings import FINDINGS, verdict
from preftree.io.html import html_templates
from preftree.report import content
from preftree.report.read import RunView
from preftree.report.repeat import changed_settings, command_parts


def page(runs: Sequence[RunView], scores: Mapping[str, Any] | None, title: str | None, live: str = "") -> str:
    """The page of some runs.

    Args:
        scores: what `preftree compare` found.
        title: the heading.
        live: where the page asks for its newer self (`watch`); "" for a file.
    """
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            **_values(runs, scores, title),
            live=live,
        )
    )


def body(runs: Sequence[RunView], scores: Mapping[str, Any] | None, title: str | None) -> str:
    """What is inside the page's `main`: what a live page replaces."""
    return _environment().get_template("body.html.j2").render(**_values(runs, scores, title))


def _values(runs: Sequence[RunView], scores: Mapping[str, Any] | None, title: str | None) -> dict[str, Any]:
    return {
        "title": title or ", ".join(run.name for run in runs),
        "runs": runs,
        "several": len(runs) > 1,
        "verdict": verdict,
        "looked_for": len(FINDINGS),
        "first_answers": content.FIRST_ANSWERS,
        "overview": content.overview(runs),
        "curves": content.curves(runs),
        "scores": scores,
        "content": content,
        "command": command_parts,
        "changed": changed_settings,
        "version": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _environment() -> Environment:
    environment = html_templates("preftree.report")
    environment.filters["signed_percent"] = lambda value: f"{100 * value:+.2f}"
    environment.filters["p_value"] = lambda value: f"{value:.3f}" if value >= 0.001 else "< 0.001"
    environment.filters["run_name"] = content.run_name
    environment.filters["share_stderr"] = content.share_stderr
    environment.filters["as_percent"] = lambda value: f"{100 * value:.2f}"
    return environment
