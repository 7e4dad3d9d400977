"""The cheap part of the check, which training runs by itself: about 50 µs per pair, no tokenizer, no second reading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preftree.check.read import Pairs, Seen
from preftree.check.report import NOTE, SPOILS, Finding, make_finding
from preftree.check.rows import ROW_CHECKS
from preftree.check.sets import contradictory_pairs, duplicate_pairs, length_bias
from preftree.check.views import percent
from preftree.data.record import PreferencePair
from preftree.text.refusals import is_refusal

#: Chosen answers that are looked at for refusals, spread evenly.
REFUSAL_SAMPLE = 5000


def quick_check(pairs: Sequence[PreferencePair], name: str) -> list[str]:
    """One or two lines about the pairs read from `name`; two where something would spoil training."""
    seen = Seen(pairs=Pairs())
    for row, pair in enumerate(pairs):
        seen.pairs.add(row, pair)
    findings = [*length_bias(seen), *contradictory_pairs(seen), *duplicate_pairs(seen), _refusals(pairs)]
    worth = [f"{f.what} ({percent(f.share)})" for f in findings if f.level in (SPOILS, NOTE)]
    said = [f"check      {'; '.join(worth) or 'no length bias, no contradictions, no duplicates'}"]
    bad = [finding.what for finding in findings if finding.level == SPOILS]
    if bad:
        said.append(f"           WARNING: {' and '.join(bad)} would spoil training; see: preftree check {name}")
    return said


def _refusals(pairs: Sequence[PreferencePair]) -> Finding:
    some = pairs[:: -(-len(pairs) // REFUSAL_SAMPLE) or 1]
    rows = np.flatnonzero([is_refusal(pair.chosen) for pair in some])
    return make_finding("chosen_refusal", ROW_CHECKS["chosen_refusal"][1], len(rows), len(some), rows)
