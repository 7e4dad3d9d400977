"""The conversation itself: what was said, who answered on which side, and what a vote makes of it. No terminal here."""

from __future__ import annotations

import datetime
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from preftree.data.record import Turn
from preftree.errors import DataError, ModelError, RunError
from preftree.io.jsonl import append_jsonl, read_jsonl
from preftree.model.generate import Answer, Sampling
from preftree.samples.opened import SIDES, OpenRun, Side


@dataclass(frozen=True)
class Exchange:
    """One prompt with both answers.

    Args:
        order: who is on the left and who on the right.
        answers: by side.
    """

    system: str | None
    turns: tuple[Turn, ...]
    order: tuple[Side, Side]
    answers: dict[Side, Answer]
    seed: int
    sampling: Sampling

    @property
    def same(self) -> bool:
        """Did both give the same answer?"""
        return self.answers["base"].text == self.answers["trained"].text


class Talk:
    """A conversation that both models share: it goes on from the answer that was voted for, else from the trained
    model's, so that both always answer the same prompt.

    Args:
        blind: shuffle the sides.
    """

    def __init__(self, opened: OpenRun, *, blind: bool = False) -> None:
        self.opened, self.blind = opened, blind
        self.system = opened.system
        self.turns: list[Turn] = []
        self.votes: Counter[str] = Counter()
        self._asked = 0
        self._random = random.Random(opened.seed)

    def ask(self, text: str, show: Callable[[int, str], None]) -> Exchange:
        """Both answers to a new turn; `show` gets the side (0 is the left one) and its text so far.

        Raises ModelError where the template does not render the conversation.
        """
        turns = (*self.turns, Turn("user", text))
        ids = self.opened.ids(self.opened.messages(turns, self.system))
        order: tuple[Side, Side] = SIDES
        if self.blind and self._random.random() < 0.5:
            order = (SIDES[1], SIDES[0])
        seed = self.opened.seed + self._asked
        self._asked += 1
        answers = {}
        for place, side in enumerate(order):
            answers[side] = self.opened.stream(side, ids, seed, partial(show, place))
        self._go_on(turns, answers["trained"])
        return Exchange(self.system, turns, order, answers, seed, self.opened.decoding.sampling)

    def _go_on(self, turns: tuple[Turn, ...], answer: Answer) -> None:
        self.turns = [*turns, Turn("assistant", answer.text)]

    def vote(self, exchange: Exchange, place: int | None) -> dict[str, Any] | None:
        """Take a vote for the left (0) or the right (1) answer, or a tie (None).

        Returns the preference pair that the vote makes; None for a tie, and where both answers are the same.
        """
        if place is None or exchange.same:
            self.votes["tie"] += 1
            return None
        better = exchange.order[place]
        worse = exchange.order[1 - place]
        self.votes[better] += 1
        self._go_on(exchange.turns, exchange.answers[better])
        return self._pair(exchange, better, worse)

    def _pair(self, exchange: Exchange, better: Side, worse: Side) -> dict[str, Any]:
        run, sampling = self.opened.run, exchange.sampling
        system = [{"role": "system", "content": exchange.system}] if exchange.system else []
        turns = [{"role": turn.role, "content": turn.content} for turn in exchange.turns]
        return {
            "prompt": [*system, *turns],
            "chosen": [{"role": "assistant", "content": exchange.answers[better].text}],
            "rejected": [{"role": "assistant", "content": exchange.answers[worse].text}],
            "provenance": {
                "command": "preftree chat",
                "run": str(run.folder.absolute()),
                "base": run.base_name,
                "chosen_by": better,
                "rejected_by": worse,
                "blind": self.blind,
                "seed": exchange.seed,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            },
        }

    def start_over(self, system: str | None = None) -> None:
        """Forget the conversation; `system` sets another system prompt, "" none."""
        self.turns = []
        if system is not None:
            self.system = system or None

    def set(self, name: str, value: str) -> None:
        """Change a sampling setting for the answers to come. Raises ModelError where there is no such value."""
        decoding = self.opened.decoding
        kinds: dict[str, type] = {
            "temperature": float,
            "top_p": float,
            "top_k": int,
            "max_new_tokens": int,
            "seed": int,
        }
        if name not in kinds:
            raise ModelError(f"there is no setting {name!r}: {', '.join(kinds)}.")
        try:
            number = kinds[name](value)
        except ValueError:
            raise ModelError(f"{name} must be a number. Got {value!r} instead.") from None
        low, high = {"top_p": (1e-6, 1.0), "max_new_tokens": (1, float("inf"))}.get(name, (0, float("inf")))
        if not low <= number <= high:
            raise ModelError(f"{name} cannot be {value}.")
        if name == "seed":
            self.opened = replace(self.opened, seed=number)
        elif name == "max_new_tokens":
            self.opened = replace(self.opened, decoding=replace(decoding, max_new_tokens=number))
        else:
            self.opened = replace(
                self.opened, decoding=replace(decoding, sampling=replace(decoding.sampling, **{name: number}))
            )


class VoteFile:
    """Preference pairs that grow by a line per vote, in a format that training reads.

    Raises:
        RunError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            earlier = list(read_jsonl(path))
        except (DataError, OSError) as problem:
            raise RunError(f"--votes {path} cannot be read: {problem} Give another file.") from None
        if any(not isinstance(row, dict) or not {"prompt", "chosen", "rejected"} <= set(row) for row in earlier):
            raise RunError(f"--votes {path} holds other rows than preference pairs. Give another file.")
        self.count = len(earlier)
        if not path.absolute().parent.is_dir():
            raise RunError(f"--votes {path}: there is no folder {path.parent}. Make it, or give another place.")

    def add(self, pair: dict[str, Any]) -> None:
        """Append a vote; it is on the disk when this returns."""
        try:
            append_jsonl(self.path, pair, durable=True)
        except OSError as problem:
            raise RunError(f"the vote could not be written to {self.path}: {problem.strerror}.") from problem
        self.count += 1
