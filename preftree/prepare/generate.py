"""Rejected answers for selected prompts, in rounds, one journal entry for each fixed batch.

In round r every answer that is still wanted is asked for with a seed made of (seed, prompt, number, r), nothing else.
The answers of a round are judged together once all are there; what is refused is asked again in the next round, with
another seed, and given up after the last one. So the batches of a round follow from the journal of the rounds
before, whatever was killed in between, and so does every byte of the result. Batches are fixed because rounding, hence
now and then a sampled token, depends on which rows are computed together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from preftree.data.chat import Messages
from preftree.model.generate import Answer, by_length
from preftree.prepare.journal import Journal
from preftree.prepare.workers import Make, Workers
from preftree.text.duplicates import exact_key

#: An answer's text as it is kept, or "" and the reason why it is not.
Judgement = tuple[str, str]


@dataclass(frozen=True)
class Prompt:
    """What to ask, and what to take for an answer.

    Args:
        key: names the prompt; with it the seeds are made.
        messages: the conversation to be answered, for (number of the answer, round).
        judge: the verdict on an answer, given the texts already kept for this prompt.
    """

    key: str
    messages: Callable[[int, int], Messages]
    judge: Callable[[Answer, Sequence[str]], Judgement]


@dataclass(frozen=True)
class KeptAnswer:
    """An answer that was taken, and what it takes to ask for it again."""

    text: str
    finished: bool
    seed: int
    round: int


@dataclass(frozen=True)
class Request:
    """One answer asked of an engine; `prompt` is what the engine's `Render` made of the messages."""

    prompt: Any
    seed: int


Unit = Sequence[Request]
"""Requests that are always answered together."""
Render = Callable[[Messages], tuple[Any, int]]
"""Messages -> a prompt as the engine takes it, and its length to sort by."""


class Engine(Protocol):
    """What answers: called with a unit, gives an answer for each of its requests."""

    def __call__(self, unit: Unit) -> list[Answer]: ...


@dataclass(frozen=True)
class SamplingPlan:
    """How answers are asked for: `answers` for each prompt, `batch_size` at once, at most `rounds` times."""

    seed: int
    answers: int = 1
    batch_size: int = 16
    rounds: int = 4


@dataclass
class Generated:
    """The answers kept, by prompt, in the order of the prompts' numbers; why others were refused; how many came from
    each round's journal."""

    kept: list[list[KeptAnswer]]
    refused: Counter[str] = field(default_factory=Counter)
    given_up: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class MissingAnswer:
    """One answer still to be had: of prompt `row`, its `number`."""

    row: int
    number: int


ReportProgress = Callable[[int, int], None]
"""Called with (answers done, answers to do)."""


def generate(
    prompts: Sequence[Prompt],
    plan: SamplingPlan,
    render: Render,
    workers: Workers,
    make_engine: Make[Unit, list[Answer]],
    journal: Journal,
    progress: Callable[[int, int], ReportProgress] = lambda attempt, total: lambda done, left: None,
) -> Generated:
    """Answers to all prompts, as the module's docstring says.

    The engine is made only if something is left to be asked. `progress` is called with (round, answers that the journal
    already has) and returns what is called with (answers done, answers to do) of the rest.
    """
    result = Generated([[] for _ in prompts])
    wanted = [MissingAnswer(row, number) for row in range(len(prompts)) for number in range(plan.answers)]
    for attempt in range(plan.rounds):
        asked = [_request(prompts[item.row], item.number, attempt, plan.seed, render) for item in wanted]
        answers = _answers(asked, attempt, plan.batch_size, workers, make_engine, journal, progress)
        refused: list[MissingAnswer] = []
        reasons: list[str] = []
        for item, (request, _), answer in zip(wanted, asked, answers, strict=True):
            kept = result.kept[item.row]
            text, reason = prompts[item.row].judge(answer, [other.text for other in kept])
            if reason:
                refused.append(item)
                reasons.append(reason)
            else:
                kept.append(KeptAnswer(text, answer.finished, request.seed, attempt))
        result.refused.update(reasons)
        wanted, result.given_up = refused, Counter(reasons)
    return result


def seed_of(seed: int, key: str, number: int, attempt: int) -> int:
    """The seed of one answer: 31 bits, which every engine takes."""
    return exact_key(str(seed), key, str(number), str(attempt)) & 0x7FFFFFFF


def _request(prompt: Prompt, number: int, attempt: int, seed: int, render: Render) -> tuple[Request, int]:
    content, length = render(prompt.messages(number, attempt))
    return Request(content, seed_of(seed, prompt.key, number, attempt)), length


def _answers(
    asked: Sequence[tuple[Request, int]],
    attempt: int,
    batch_size: int,
    workers: Workers,
    make_engine: Make[Unit, list[Answer]],
    journal: Journal,
    progress: Callable[[int, int], ReportProgress],
) -> list[Answer]:
    """The answers to one round's requests, in their order: from the journal, and the others into it."""
    units = list(_units(asked, attempt, batch_size))
    todo = [(name, rows) for name, rows in units if name not in journal]
    left = sum(len(rows) for _, rows in todo)
    report, done = progress(attempt, len(asked) - left), 0
    for number, answers in workers.map(make_engine, ([asked[row][0] for row in rows] for _, rows in todo)):
        journal.append(todo[number][0], [[answer.text, answer.finished, answer.failure] for answer in answers])
        done += len(answers)
        report(done, left)
    by_row = {row: Answer(*entry) for name, rows in units for row, entry in zip(rows, journal[name], strict=True)}
    return [by_row[row] for row in range(len(asked))]


def _units(asked: Sequence[tuple[Request, int]], attempt: int, batch_size: int) -> Iterator[tuple[str, list[int]]]:
    """The fixed batches of a round and their names in the journal. A name holds a digest of what is asked, so that
    an entry made for other prompts is never taken."""
    order = by_length([length for _, length in asked])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        digest = exact_key(*(f"{asked[row][0].seed} {asked[row][0].prompt}" for row in rows))
        yield f"{attempt}.{start // batch_size}.{digest:016x}", rows
