"""A few words of the rows that findings name, read from the source a second time: the first reading kept no texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from preftree.check.read import Seen
from preftree.check.report import Finding, RowExample
from preftree.check.rows import CONTROL_TOKENS, texts_of
from preftree.data.record import PreferenceRecord
from preftree.data.scan import Table, TableScan
from preftree.text.damage import damage
from preftree.text.refusals import is_refusal

#: Longest excerpt in characters, and the rows that are read again at most.
LENGTH = 72
MAX_ROWS_AGAIN = 200_000

# What a sound text in Latin script has little of, so that damage is near the first of it.
_ODD = re.compile(r"[^\x20-\x7e\n\t\r]")


def add_excerpts(findings: Iterable[Finding], seen: Seen, tables: Iterable[Table]) -> None:
    """Fill in the text of every finding's examples; `tables` are those that were read, to be read again."""
    wanted: dict[int, list[tuple[Finding, RowExample]]] = {}
    for finding in findings:
        for row, example in zip(finding.rows.tolist(), finding.examples, strict=False):
            if row < MAX_ROWS_AGAIN:
                wanted.setdefault(row, []).append((finding, example))
    for row, record in _records(seen, tables, set(wanted)):
        for finding, example in wanted[row]:
            example.text = _EXCERPTS.get(finding.key, _of_prompt)(record)


def _records(seen: Seen, tables: Iterable[Table], rows: set[int]) -> Iterator[tuple[int, PreferenceRecord]]:
    """The records of these rows, no table read further than the last of them."""
    starts = {short: start for start, short in seen.tables}
    ends = {short: end for (_, short), (end, _) in zip(seen.tables, [*seen.tables[1:], (seen.rows, "")], strict=True)}
    for table in tables:
        inside = [row for row in rows if table.short in starts and starts[table.short] <= row < ends[table.short]]
        if not inside:
            continue
        for row, scanned in enumerate(TableScan(table), start=starts[table.short]):
            if row in rows and scanned.record is not None:
                yield row, scanned.record
            if row == max(inside):
                break


def _of_prompt(record: PreferenceRecord) -> str:
    return shortened(record.turns[-1].content if record.turns else record.system or "")


def _of_best_answer(record: PreferenceRecord) -> str:
    best = record.pairs()
    return shortened(best[0].chosen) if best else _of_prompt(record)


def _of_refusal(record: PreferenceRecord) -> str:
    return next((shortened(r.text) for r in record.responses if is_refusal(r.text)), _of_prompt(record))


def _around_damage(record: PreferenceRecord) -> str:
    hit = next((text for text in texts_of(record) if damage(text)), "")
    odd = _ODD.search(hit)
    return shortened(hit, odd.start() if odd else 0)


def _around_control_token(record: PreferenceRecord) -> str:
    hits = ((text, found) for text in texts_of(record) if (found := CONTROL_TOKENS.search(text)))
    return next((shortened(text, found.start()) for text, found in hits), "")


def shortened(text: str, around: int = 0) -> str:
    """At most `LENGTH` characters of `text`, on one line, that hold the place `around`."""
    start = max(0, around - LENGTH // 2) if len(text) > LENGTH else 0
    piece = text[start : start + LENGTH]
    head, tail = "…" if start else "", "…" if start + LENGTH < len(text) else ""
    return f"{head}{' '.join(piece.split())}{tail}"


_EXCERPTS: dict[str, Callable[[PreferenceRecord], str]] = {
    "chosen_refusal": _of_refusal,
    "control_tokens": _around_control_token,
    "language": _of_best_answer,
    "mojibake": _around_damage,
    "characters_lost_in_decoding": _around_damage,
    "control_characters": _around_damage,
    "lone_surrogates": _around_damage,
}
"""Key of a finding -> what of a row shows it; for all others the prompt tells which row it is."""
