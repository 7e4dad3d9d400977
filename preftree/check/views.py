"""The report for people, in a terminal. Texts of the data are shown as they are, never as markup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from preftree.check.report import FINE, NOTE, SKIPPED, SPOILS, Finding, Report
from preftree.io.console import sayer, visible

if TYPE_CHECKING:
    from preftree.check.trained import TokenText, TrainedPair

#: Rows named in the table, and those of them whose text is quoted.
SHOWN, QUOTED = 5, 3
#: Token ids shown at each end of a longer sequence; --json has all.
IDS = 5
_STYLES = {SPOILS: "bold red", NOTE: "yellow", FINE: "green", SKIPPED: "dim"}
_WORDS = {SPOILS: "SPOILS", NOTE: "note", FINE: "fine", SKIPPED: "skipped"}


def show(report: Report, console: Console) -> None:
    """Print the report."""
    say = sayer(console)
    counts = f"{_number(report.rows, 'row')}, {_number(report.pairs, 'pair')}"
    say(f"source     {report.source}: {', '.join(report.formats)}, {counts}")
    for note in report.notes:
        say(f"           {note}")
    console.print(_table(report.of(SPOILS, NOTE), one_file=len(report.files) == 1))
    rest = [("not found", [finding.what for finding in report.of(FINE)])]
    rest += [(f"not looked for: {why}", whats) for why, whats in report.skipped().items()]
    console.print(_lists([(head, whats) for head, whats in rest if whats]))
    for problem in report.problems[:SHOWN]:
        say(f"broken     {problem}")
    if len(report.problems) > SHOWN:
        say(f"           … and {len(report.problems) - SHOWN} more; --json lists them")
    _show_trained(report.trained, console)
    width = max((len(name) for name in report.facts), default=0)
    for name, value in report.facts.items():
        say(f"{name:{width}}  {f'{value:,}' if isinstance(value, int) else value}")
    console.print(Text(report.verdict(), _STYLES[SPOILS if report.spoiled else FINE]))


_SIDES = {"prompt": "dim", "chosen": "green", "rejected": "yellow"}


def _show_trained(pairs: list[TrainedPair], console: Console) -> None:
    """Each pair's tokens as text, a block per side: the prompt, which is not scored, and both answers."""
    say = sayer(console)
    for pair in pairs:
        say(f"trained on {pair.place}{f': left out, as {pair.reason}' if pair.reason else ''}")
        for note in pair.notes:
            say(f"           {note}")
        for name, piece in pair.parts:
            console.print(Text(f"  {name:8} {token_count(piece)}: {_ids(piece.ids)}", "bold"))
            console.print(Padding(Text(visible(piece.text), _SIDES[name]), (0, 0, 0, 11)))
    if pairs:
        say("           (prompt + chosen and prompt + rejected are the sequences; only the answers' tokens are scored)")


def token_count(piece: TokenText) -> str:
    """How many tokens there are, and of how many they were left: "30 of 44 tokens (cut)"."""
    if piece.cut:
        return f"{len(piece.ids):,} of {len(piece.ids) + piece.cut:,} tokens (cut)"
    return _number(len(piece.ids), "token")


def _ids(ids: list[int]) -> str:
    if len(ids) <= 2 * IDS:
        return " ".join(map(str, ids))
    return f"{' '.join(map(str, ids[:IDS]))} … {' '.join(map(str, ids[-IDS:]))}"


def _table(findings: list[Finding], one_file: bool) -> Table:
    """A row per finding; what explains it stands below its name, so that 80 columns are enough."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    for finding in findings:
        what = Text(visible(finding.what))
        places = row_list(finding, SHOWN, one_file)
        for line in filter(None, (finding.why, finding.detail, f"rows: {places}" if places else "")):
            what.append(f"\n{visible(line)}", "dim")
        for example in finding.examples[:QUOTED]:
            if example.text:
                what.append(f"\n  {visible(f'{example.number if one_file else example.place}: {example.text}')}", "dim")
        table.add_row(
            Text(_WORDS[finding.level], _STYLES[finding.level]),
            what,
            Text(counted(finding)),
            Text(percent(finding.share) + (f"\nof {finding.sampled:,}" if finding.sampled else "")),
        )
    return table


def _lists(lists: list[tuple[str, list[str]]]) -> Table:
    """Headings, each with what is listed under it."""
    table = Table(box=None, pad_edge=False, padding=0, show_header=False)
    for head, whats in lists:
        table.add_row(Text(head))
        table.add_row(Padding(Text(", ".join(whats), "dim"), (0, 0, 0, 8)))
    return table


def counted(finding: Finding) -> str:
    """Count and unit: "1,234 pairs", "1 row"."""
    return _number(finding.count, finding.unit.removesuffix("s"))


def _number(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def row_list(finding: Finding, most: int, one_file: bool = False) -> str:
    """The first rows of a finding, a file's name once: "pairs.jsonl 3, 24, 27 and 19 more"; not, where all are in one.

    "" for a finding that names no rows.
    """
    files: dict[str, list[str]] = {}
    for example in finding.examples[:most]:
        files.setdefault(example.file, []).append(str(example.number))
    shown = "; ".join(f"{'' if one_file else f'{file} '}{', '.join(numbers)}" for file, numbers in files.items())
    more = len(finding.rows) - len(finding.examples[:most])
    return f"{shown} and {more:,} more" if more > 0 else shown


def percent(share: float) -> str:
    """0.1234 as "12.3 %", and what is above 0 never as "0.0 %"."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
