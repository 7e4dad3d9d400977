"""The check stage: read, measure, judge, show."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from preftree.check.fix import FixPlan, check_target, write_fixed
from preftree.check.html import write_html
from preftree.check.read import PairHook, Sample, Seen, read
from preftree.check.report import SKIPPED, SPOILS, Finding, Histogram, Report, histogram
from preftree.check.sets import SET_CHECKS
from preftree.check.texts import NearPrompts, Overlap, languages
from preftree.check.views import show
from preftree.config.check import CheckSettings, parse_check_settings
from preftree.data.record import PreferencePair, PreferenceRecord
from preftree.data.sources import Source, find_tables
from preftree.errors import DataError
from preftree.io.console import sayer
from preftree.io.progress import Progress
from preftree.text.overlap import OverlapIndex, read_test_questions

if TYPE_CHECKING:
    from preftree.check.tokens import Tokens

#: Places of rows that the table and the HTML name.
NAMED = 20


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """`preftree check`: 0, or 1 where something would spoil training.

    Raises:
        PreftreeError: nothing can be read there, or a setting that cannot be used.
    """
    settings = parse_check_settings(argv)
    for flag, target in (("--html", settings.html), ("--fix", settings.fix)):
        check_target(flag, target, settings.dataset_name or "")
    # With --json, stdout holds the report and nothing else.
    console = console or Console(stderr=settings.json, soft_wrap=False)
    say = sayer(console)
    report, seen = check(settings, console)
    if settings.json:
        json.dump(report.as_dict(lambda rows: seen.places(rows.tolist())), sys.stdout, indent=2, ensure_ascii=True)
        print()
    else:
        show(report, console)
    if settings.html:
        write_html(report, Path(settings.html))
        say(f"written    {settings.html}")
    if settings.fix:
        for line in write_fixed(settings, seen, FixPlan.of(report, seen), Path(settings.fix)):
            say(line)
    return int(report.spoiled)


def check(settings: CheckSettings, console: Console) -> tuple[Report, Seen]:
    """Read everything once, measure and judge."""
    started = time.perf_counter()
    source = Source(
        settings.dataset_name or "",
        split=settings.split,
        config=settings.dataset_config_name,
        cache_dir=settings.cache_dir,
        token=settings.use_auth_token or None,
        streaming=settings.streaming,
    )
    tables, left_out = find_tables(source)
    notes: list[str] = []
    tokens = _tokens(settings)
    overlap = Overlap(_index(settings.eval_data, notes)) if settings.eval_data else None
    near = NearPrompts() if settings.near_duplicates else None
    sample = Sample(settings.token_sample or 4000)
    hooks: list[PairHook] = [_each_pair(sample.add), _Clock(console)]
    hooks += [hook for hook in (overlap, near) if hook is not None]
    if tokens is not None and settings.token_sample == 0:
        hooks.append(_each_pair(tokens.add))
    seen = read(tables, rule=settings.pair_rule, min_margin=settings.min_margin, limit=settings.max_rows, hooks=hooks)
    findings = [finding for measure in SET_CHECKS.values() for finding in measure(seen)]
    findings += [hook.finding(seen.rows) for hook in (overlap, near) if hook is not None]
    more, facts = languages(sample.pairs, len(seen.pairs))
    findings += more
    histograms = _length_histograms(seen)
    if tokens is not None:
        _tokenize_sample(tokens, sample, settings, console)
        sampled = len(tokens) if len(tokens) < len(seen.pairs) else None
        findings += tokens.findings(sampled)
        facts |= tokens.facts(len(seen.pairs))
        histograms = tokens.histograms() + histograms
        notes += tokens.encoder.report.notes
    findings += _not_done(settings, seen)
    for finding in findings:
        finding.places = seen.places(finding.rows[:NAMED].tolist())
    report = Report(
        source=settings.dataset_name or "",
        files=seen.files,
        left_out=left_out,
        formats=list(dict.fromkeys(seen.formats)),
        rows=seen.rows,
        pairs=len(seen.pairs),
        settings=dataclasses.asdict(settings),
        findings=findings,
        facts=facts,
        histograms=histograms,
        notes=notes + [f"left out, as a file of another split: {name}" for name in left_out],
        problems=seen.problems,
    )
    report.seconds = time.perf_counter() - started
    return report, seen


def _each_pair(add: Any) -> PairHook:
    def hook(row: int, record: PreferenceRecord, pairs: list[PreferencePair]) -> None:
        for pair in pairs:
            add(row, pair)

    return hook


class _Clock:
    """Reports the rows read so far; how many there are is not known before the end."""

    def __init__(self, console: Console) -> None:
        self.say = sayer(console)
        self.started = self.said = time.perf_counter()
        self.rows = 0

    def __call__(self, row: int, record: PreferenceRecord, pairs: list[PreferencePair]) -> None:
        self.rows += 1
        if self.rows % 1000 == 0 and (now := time.perf_counter()) - self.said > 5:
            self.said = now
            rate = self.rows / (now - self.started)
            self.say(f"reading    {self.rows} rows, {rate:.0f} per second")


def _index(folder: str, notes: list[str]) -> OverlapIndex:
    index = OverlapIndex(read_test_questions(folder, notes.append))
    if not index.questions:
        raise DataError(f"--eval_data {folder}: its questions are no texts, or all too short to be looked for.")
    held = ", ".join(f"{count} of {name}" for name, count in index.counts().items())
    notes.append(f"test questions looked for: {held}")
    return index


def _tokens(settings: CheckSettings) -> Tokens | None:
    if not settings.model_name_or_path:
        return None
    # Importing torch and transformers takes longer than reading ten thousand pairs.
    from preftree.check.tokens import Tokens
    from preftree.data.encode import PairEncoder
    from preftree.model.load import load_tokenizer, resolve

    token = True if settings.use_auth_token else None
    tokenizer = load_tokenizer(
        resolve(settings.model_name_or_path),
        revision=settings.model_revision,
        cache_dir=settings.cache_dir,
        token=token,
    )
    encoder = PairEncoder(tokenizer, max_length=settings.max_length, max_prompt_length=settings.max_prompt_length)
    return Tokens(encoder, keep=settings.token_sample or 4000)


def _tokenize_sample(tokens: Tokens, sample: Sample, settings: CheckSettings, console: Console) -> None:
    if settings.token_sample:
        progress = Progress(console, "tokenizing ", "pairs")
        for done, (row, pair) in enumerate(sample.pairs, start=1):
            tokens.add(row, pair)
            progress(done, len(sample.pairs))
    tokens.flush()


def _length_histograms(seen: Seen) -> list[Histogram]:
    chosen, rejected = seen.pairs.length("chosen"), seen.pairs.length("rejected")
    if not len(chosen):
        return []
    return [
        histogram("Answers", "characters", {"chosen": chosen, "rejected": rejected}),
        histogram("Chosen minus rejected length", "characters", {"difference": chosen - rejected}),
        histogram("Prompts", "characters", {"prompt": seen.pairs.length("prompt")}),
    ]


def _not_done(settings: CheckSettings, seen: Seen) -> list[Finding]:
    """What was not looked for, and the one finding that no measure makes: nothing to train on."""
    said = []
    if not settings.model_name_or_path:
        said.append(("tokens", "lengths in tokens, cuts, what trees save", "--model_name_or_path names the tokenizer"))
    if not settings.eval_data:
        said.append(("test_overlap", "overlap with test sets", "--eval_data names a folder with them"))
    if not settings.near_duplicates:
        said.append(("near_duplicate_prompts", "prompts nearly equal", "--near_duplicates looks for them"))
    findings = [Finding(key, SKIPPED, what, why) for key, what, why in said]
    if not len(seen.pairs) or not np.any(seen.pairs.trainable):
        why = "training needs, for the same prompt, one answer that is preferred to another"
        findings.append(Finding("no_pairs", SPOILS, "no pair to train on", why, seen.rows, seen.rows))
    return findings
