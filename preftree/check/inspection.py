"""Everything that one check looks at: what sees each record while it is read, and what is said of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from preftree.check.read import PairHook, Sample, Seen
from preftree.check.report import SKIPPED, SPOILS, Finding, Histogram, SampleRow, histogram
from preftree.check.sets import SET_CHECKS
from preftree.check.texts import NearPrompts, Overlap, languages
from preftree.config.check import CheckSettings
from preftree.data.record import PreferencePair, PreferenceRecord
from preftree.errors import DataError
from preftree.io.progress import Progress
from preftree.text.overlap import OverlapIndex, read_test_questions

if TYPE_CHECKING:
    from preftree.check.tokens import Tokens
    from preftree.check.trained import TrainedPair

#: Pairs of which a random sample is drawn where --token_sample says all.
SAMPLE = 4000
#: Pairs that the report shows.
SHOWN_SAMPLES = 4


class Inspection:
    """The parts of a check that the settings ask for.

    Raises ModelError or DataError where the tokenizer or the test questions cannot be had, before any row is read.
    """

    def __init__(self, settings: CheckSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.notes: list[str] = []
        self.tokens = _tokens(settings)
        self.overlap = Overlap(self._test_questions(settings.eval_data)) if settings.eval_data else None
        self.near = NearPrompts() if settings.near_duplicates else None
        self.sample = Sample(settings.token_sample or SAMPLE)
        self.first: list[PreferencePair] = []

    def _test_questions(self, folder: str) -> OverlapIndex:
        index = OverlapIndex(read_test_questions(folder, self.notes.append))
        if not index.questions:
            raise DataError(f"--eval_data {folder}: its questions are no texts, or all too short to be looked for.")
        held = ", ".join(f"{count} of {name}" for name, count in index.counts().items())
        self.notes.append(f"test questions looked for: {held}")
        return index

    def hooks(self) -> list[PairHook]:
        """What is called with every record."""
        hooks: list[PairHook] = [_each_pair(self.sample.add)]
        hooks += [hook for hook in (self.overlap, self.near) if hook is not None]
        if self.settings.show:
            hooks.append(_each_pair(self._keep_first))
        if self.tokens is not None and self.settings.token_sample == 0:
            hooks.append(_each_pair(self.tokens.add))
        return hooks

    def _keep_first(self, row: int, pair: PreferencePair) -> None:
        if len(self.first) < self.settings.show:
            self.first.append(pair)

    def finish(self) -> None:
        """Tokenize what is still to be tokenized."""
        if self.tokens is None:
            return
        if self.settings.token_sample:
            progress = Progress(self.console, "tokenizing ", "pairs")
            for done, (row, pair) in enumerate(self.sample.pairs, start=1):
                self.tokens.add(row, pair)
                progress(done, len(self.sample.pairs))
        self.tokens.flush()
        self.notes += self.tokens.encoder.report.notes

    def findings(self, seen: Seen) -> list[Finding]:
        """What every measure says."""
        findings = [finding for measure in SET_CHECKS.values() for finding in measure(seen)]
        findings += [hook.finding(seen.rows) for hook in (self.overlap, self.near) if hook is not None]
        findings += languages(self.sample.pairs, len(seen.pairs))[0]
        if self.tokens is not None:
            findings += self.tokens.findings(len(seen.pairs))
        return [*findings, *self._not_looked_for(), *_nothing_to_train_on(seen)]

    def facts(self, pairs: int) -> dict[str, Any]:
        """Numbers by name."""
        facts = languages(self.sample.pairs, pairs)[1]
        return facts | (self.tokens.facts(pairs) if self.tokens is not None else {})

    def histograms(self, seen: Seen) -> list[Histogram]:
        """Lengths in tokens, where there is a tokenizer, and in characters."""
        return (self.tokens.histograms() if self.tokens is not None else []) + _length_histograms(seen)

    def samples(self) -> list[SampleRow]:
        """A few pairs from all over the source."""
        return [
            SampleRow(pair.source, "\n\n".join(turn.content for turn in pair.turns), pair.chosen, pair.rejected)
            for _, pair in self.sample.pairs[:: max(1, len(self.sample.pairs) // SHOWN_SAMPLES)][:SHOWN_SAMPLES]
        ]

    def trained(self) -> list[TrainedPair]:
        """The first pairs as they are trained on, as many as --show says."""
        if self.tokens is None or not self.first:
            return []
        from preftree.check.trained import as_trained

        return as_trained(self.first, self.tokens.encoder)

    def _not_looked_for(self) -> list[Finding]:
        settings = self.settings
        left: list[tuple[bool, str, str, str]] = [
            (
                self.tokens is None,
                "tokens",
                "what the chat template leaves out or refuses, lengths in tokens, cuts, what trees save",
                "--model_name_or_path names the tokenizer",
            ),
            (not settings.eval_data, "test_overlap", "overlap with test sets", "--eval_data names a folder with them"),
            (
                not settings.near_duplicates,
                "near_duplicate_prompts",
                "prompts nearly equal",
                "--near_duplicates looks for them",
            ),
        ]
        return [Finding(key, SKIPPED, what, why) for skipped, key, what, why in left if skipped]


def _each_pair(add: Callable[[int, PreferencePair], None]) -> PairHook:
    def hook(row: int, record: PreferenceRecord, pairs: list[PreferencePair]) -> None:
        for pair in pairs:
            add(row, pair)

    return hook


def _tokens(settings: CheckSettings) -> Tokens | None:
    if not settings.model_name_or_path:
        return None
    # Importing torch and transformers takes longer than reading ten thousand pairs.
    from preftree.check.tokens import Tokens
    from preftree.data.encode import PairEncoder
    from preftree.model.load import load_tokenizer, resolve_tokenizer

    tokenizer = load_tokenizer(
        resolve_tokenizer(settings.model_name_or_path),
        revision=settings.model_revision,
        cache_dir=settings.cache_dir,
        token=True if settings.use_auth_token else None,
    )
    encoder = PairEncoder(tokenizer, max_length=settings.max_length, max_prompt_length=settings.max_prompt_length)
    return Tokens(encoder, keep=settings.token_sample or SAMPLE)


def _length_histograms(seen: Seen) -> list[Histogram]:
    chosen, rejected = seen.pairs.length("chosen"), seen.pairs.length("rejected")
    if not len(chosen):
        return []
    return [
        histogram("Answers", "characters", {"chosen": chosen, "rejected": rejected}),
        histogram("Chosen minus rejected length", "characters", {"difference": chosen - rejected}),
        histogram("Prompts", "characters", {"prompt": seen.pairs.length("prompt")}),
    ]


def _nothing_to_train_on(seen: Seen) -> list[Finding]:
    if np.any(seen.pairs.trainable):
        return []
    why = "training needs, for the same prompt, one answer that is preferred to another"
    return [Finding("no_pairs", SPOILS, "no pair to train on", why, seen.rows, seen.rows)]
