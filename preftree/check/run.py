"""The check stage: read, measure, judge, show."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from preftree.check.excerpts import add_excerpts
from preftree.check.fix import FixPlan, check_target, write_fixed
from preftree.check.html import write_html
from preftree.check.inspection import Inspection
from preftree.check.read import PairHook, Seen, read
from preftree.check.report import NOTE, SPOILS, FixAction, Report
from preftree.check.views import show
from preftree.config.check import CheckSettings, parse_check_settings
from preftree.data.sources import Source, find_tables
from preftree.errors import RunError
from preftree.io.console import next_steps, sayer
from preftree.io.progress import Progress

#: Places of rows that the table and the HTML name.
NAMED = 20


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """`preftree check`: 0, or 1 where something would spoil training.

    Raises:
        PreftreeError: nothing can be read there, or a setting that cannot be used.
    """
    settings = parse_check_settings(argv)
    for flag, target in (("--html", settings.html), ("--fix", settings.fix)):
        with _writing(flag, target or ""):
            check_target(flag, target, settings.dataset_name or "")
    # With --json, stdout holds the report and nothing else.
    console = console or Console(stderr=settings.json, soft_wrap=False)
    say = sayer(console)
    report, seen = check(settings, console)
    if settings.json:
        json.dump(report.as_dict(seen.located), sys.stdout, indent=2, ensure_ascii=True)
        print()
    else:
        show(report, console)
    if settings.html:
        with _writing("--html", settings.html):
            write_html(report, Path(settings.html))
        say(f"written    {settings.html}")
    if settings.fix and seen.unreadable:
        say(f"fixed      nothing: repair or remove what cannot be read first ({', '.join(seen.unreadable[:5])})")
    elif settings.fix:
        with _writing("--fix", settings.fix):
            said = write_fixed(settings, seen, FixPlan.of(report, seen), Path(settings.fix))
        for line in said:
            say(line)
    elif command := _next_command(report, settings):
        next_steps(say, command)
    return int(report.spoiled)


@contextmanager
def _writing(flag: str, target: str) -> Iterator[None]:
    """Raise RunError where the system does not let us write `target`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{flag} {target} cannot be written: {error.strerror or error}. Name another place.") from error


def _next_command(report: Report, settings: CheckSettings) -> str:
    """What to do next: repair the data, or train on it; "" where neither is a command."""
    source = settings.dataset_name or ""
    repairable = [f for f in report.of(SPOILS, NOTE) if f.fix is not FixAction.NONE]
    if repairable and _is_local(settings):
        given = Path(source)
        return f"preftree check {shlex.quote(source)} --fix {shlex.quote(f'{given.stem}-fixed{given.suffix}')}"
    if report.spoiled:
        return ""
    model = shlex.quote(settings.model_name_or_path or "MODEL")
    return f"preftree train --model_name_or_path {model} --dataset_name {shlex.quote(source)} --output_dir OUT"


def check(settings: CheckSettings, console: Console) -> tuple[Report, Seen]:
    """Read everything once, measure and judge."""
    started = time.perf_counter()
    tables, left_out = find_tables(_source(settings))
    inspection = Inspection(settings, console)
    reading = Progress(console, "reading    ", "rows")
    hooks: list[PairHook] = [*inspection.hooks(), lambda row, record, pairs: reading(row + 1, None)]
    seen = read(tables, rule=settings.pair_rule, min_margin=settings.min_margin, limit=settings.max_rows, hooks=hooks)
    reading(seen.rows, seen.rows)
    inspection.finish()
    findings = inspection.findings(seen)
    for finding in findings:
        finding.examples = seen.located(finding.rows[:NAMED].tolist())
    if _is_local(settings):
        add_excerpts(findings, seen, find_tables(_source(settings))[0])
    report = Report(
        source=settings.dataset_name or "",
        files=seen.files,
        left_out=left_out,
        formats=list(dict.fromkeys(seen.formats)),
        rows=seen.rows,
        pairs=len(seen.pairs),
        settings=dataclasses.asdict(settings),
        findings=findings,
        facts=inspection.facts(len(seen.pairs)),
        histograms=inspection.histograms(seen),
        notes=inspection.notes + [f"left out, as a file of another split: {name}" for name in left_out],
        problems=seen.problems,
        tokenized=len(inspection.tokens) if inspection.tokens is not None else 0,
        samples=inspection.samples(),
        trained=inspection.trained(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    report.seconds = time.perf_counter() - started
    return report, seen


def _source(settings: CheckSettings) -> Source:
    return Source(
        settings.dataset_name or "",
        split=settings.split,
        config=settings.dataset_config_name,
        cache_dir=settings.cache_dir,
        token=settings.use_auth_token or None,
        streaming=settings.streaming,
    )


def _is_local(settings: CheckSettings) -> bool:
    return Path(settings.dataset_name or "").expanduser().exists()
