"""Who judges: a server that speaks the OpenAI protocol, or a local model by the probability of its verdict.

A judge is asked about (prompt, first answer, second answer) and gives the first one's share: 1, 0, or 0.5 where it
prefers neither. Which answer stands first moves every judge, so each pair is judged in both orders (arXiv 2306.05685).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preftree.config.winrate import JudgeServerSettings
from preftree.data.chat import Chat
from preftree.data.encode import EncodedPair
from preftree.data.record import Turn
from preftree.evaluate.preference import score_pairs
from preftree.model.score import Scorer
from preftree.prepare.engines.server import ServerEngine
from preftree.prepare.generate import Request
from preftree.prepare.workers import Threads

INSTRUCTION = """\
Two assistants answered the conversation below. Which answer is better: more correct, more helpful, and no longer than
it has to be? Do not let the order of the answers or their length decide.

[Conversation]
{conversation}

[Answer A]
{first}

[Answer B]
{second}
"""
ASK_WORDS = 'Explain in one or two sentences, then end with your verdict: "[[A]]", "[[B]]", or "[[C]]" for a tie.'
ASK_LETTER = "Reply with the letter of the better answer only: A or B."
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_SHARES = {"A": 1.0, "B": 0.0, "C": 0.5}
#: Prompts of a local judge are computed in forests of this many tokens.
_BUDGET = 4096


@dataclass(frozen=True)
class JudgedPair:
    """Two answers to one conversation, in the order in which the judge reads them."""

    conversation: str
    first: str
    second: str

    def text(self, ask: str) -> str:
        """What the judge is asked."""
        return INSTRUCTION.format(**vars(self)) + "\n" + ask


@dataclass(frozen=True)
class Verdict:
    """What a judge said.

    Args:
        share: of the first answer; None where no verdict could be read.
        said: the judge's words, or what it was read from.
    """

    share: float | None
    said: str


class Judge(Protocol):
    """Judges comparisons, in their order; `progress` is called with (done, in all)."""

    def __call__(self, asked: Sequence[JudgedPair], progress: Callable[[int, int], None]) -> list[Verdict]: ...


@dataclass(frozen=True, eq=False)
class ServerJudge:
    """Asks a server for a verdict in words."""

    model: str
    server: JudgeServerSettings

    def __call__(self, asked: Sequence[JudgedPair], progress: Callable[[int, int], None]) -> list[Verdict]:
        """Raises RunError where the server cannot be used."""
        body = {"model": self.model, "max_tokens": 512, "temperature": 0.0}
        engine = ServerEngine(self.server.base_url or "", body, self.server, "--judge, --judge_model")
        units = [[Request([{"role": "user", "content": each.text(ASK_WORDS)}], 0)] for each in asked]
        found: dict[int, Verdict] = {}
        for number, (answer,) in Threads(self.server.concurrency).map(lambda: engine, units):
            found[number] = read_verdict(answer.text)
            progress(len(found), len(asked))
        return [found[number] for number in range(len(asked))]


def read_verdict(text: str) -> Verdict:
    """The last verdict in a judge's words."""
    letters = _VERDICT.findall(text)
    return Verdict(_SHARES[letters[-1]] if letters else None, text)


@dataclass(frozen=True, eq=False)
class LocalJudge:
    """Asks a local model which letter is more probable; the prompt is computed once for both."""

    scorer: Scorer
    chat: Chat

    def __call__(self, asked: Sequence[JudgedPair], progress: Callable[[int, int], None]) -> list[Verdict]:
        ids = self.chat.tokenize(["A", "B"])
        letters = tuple(ids["A"]), tuple(ids["B"])  # scored as a preference pair is
        pairs = [EncodedPair(self._prompt(each), *letters, row, "") for row, each in enumerate(asked)]
        scores = score_pairs(self.scorer, pairs, _BUDGET, progress)
        margins = (scores.chosen_P - scores.rejected_P).tolist()
        return [
            Verdict(0.5 if margin == 0 else float(margin > 0), f"log p(A) - log p(B) = {margin:+.3f}")
            for margin in margins
        ]

    def _prompt(self, each: JudgedPair) -> tuple[int, ...]:
        text = self.chat.prompt(self.chat.messages(None, [Turn("user", each.text(ASK_LETTER))]))
        return tuple(self.chat.prompt_ids(text))


def both_orders(rows: Sequence[tuple[str, str, str]]) -> list[JudgedPair]:
    """(conversation, answer of A, answer of B) -> A first, then B first, of each row."""
    return [
        JudgedPair(conversation, *answers)
        for conversation, one, other in rows
        for answers in ((one, other), (other, one))
    ]


def shares(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Verdicts of `both_orders` -> per row A's share: 1 or 0 where both orders agree, else 0.5."""
    rows = []
    for first, second in zip(verdicts[::2], verdicts[1::2], strict=True):
        known = None not in (first.share, second.share)
        as_a = (first.share, None if second.share is None else 1 - second.share)
        share = float(as_a[0]) if known and as_a[0] == as_a[1] else 0.5  # type: ignore[arg-type]
        flipped = known and {as_a[0], as_a[1]} == {0.0, 1.0}
        rows.append({"share": share, "a_first": first.said, "b_first": second.said, "read": known, "flipped": flipped})
    return rows
