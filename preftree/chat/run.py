"""`preftree chat`: the terminal around a conversation. Everything is read line by line, so it can be scripted."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from preftree.chat.talk import Exchange, Talk, VoteFile
from preftree.config.answers import ChatSettings
from preftree.errors import ModelError, RunError
from preftree.io.console import next_steps, sayer
from preftree.model.adapted import find_run
from preftree.samples.opened import open_run
from preftree.samples.show import how_drawn, styled
from preftree.text.differences import Piece, marked

HELP = """\
  any text          ask both models; the conversation goes on from the answer that you vote for
  1  2  =           after an answer: the left one is better, the right one, neither
  /new              start over             /system TEXT   another system prompt, and start over
  /blind on|off     shuffle the sides      /set NAME X    temperature, top_p, top_k, max_new_tokens, seed
  /quit             end"""
_KEYS: dict[str, int | None] = {"1": 0, "2": 1, "=": None, "l": 0, "r": 1, "left": 0, "right": 1, "tie": None}


def run(settings: ChatSettings, console: Console | None = None) -> None:
    """Talk until the input ends.

    Raises:
        PreftreeError: whatever the user can fix, before a model is loaded.
    """
    console = console or Console()
    say = sayer(console)
    found = find_run(settings.run, settings.model)
    votes = VoteFile(_votes_path(settings, found.folder))
    opened = open_run(settings, say)
    say(f"sampling   {how_drawn(opened)}, at most {settings.max_new_tokens} tokens")
    say(f"votes      {votes.path}" + (f", {votes.count} there" if votes.count else ""))
    say(f"keys       {'left and right are shuffled' if settings.blind else 'left: base, right: trained'}")
    console.print(HELP, markup=False, highlight=False)
    talk = Talk(opened, blind=settings.blind)
    _Terminal(console, talk, votes).loop()
    given = talk.votes
    say(
        f"done       votes: {given['trained']} for the trained model, {given['base']} for the base, {given['tie']} ties"
    )
    if votes.count:
        file, base, out = (shlex.quote(each) for each in (str(votes.path), found.base_name, f"{settings.run}-votes"))
        say(f"saved      {votes.path}: {votes.count} preference pairs")
        next_steps(
            say,
            f"preftree check {file} --model_name_or_path {base}",
            f"preftree train --model_name_or_path {base} --dataset_name {file} --output_dir {out}",
        )
    else:
        place = shlex.quote(settings.run)
        next_steps(
            say, f"preftree samples {place}", f"preftree merge {place} --out {shlex.quote(f'{settings.run}-merged')}"
        )


def _votes_path(settings: ChatSettings, folder: Path) -> Path:
    if settings.votes:
        return Path(settings.votes)
    path = folder / "run" / "votes.jsonl"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as problem:
        raise RunError(f"{path.parent} cannot be made ({problem.strerror}): name a file by --votes.") from problem
    return path


class _Terminal:
    """Reads lines and shows answers.

    Args:
        votes: where votes are kept.
    """

    def __init__(self, console: Console, talk: Talk, votes: VoteFile) -> None:
        self.console, self.talk, self.votes = console, talk, votes
        self.say = sayer(console)

    def loop(self) -> None:
        """Until /quit or the end of the input."""
        line = self._read("\nyou> ")
        while line is not None and line not in ("/quit", "/exit", "/q"):
            if line.startswith("/"):
                self._command(line)
                line = self._read("\nyou> ")
            elif line:
                line = self._ask(line)
            else:
                line = self._read("you> ")

    def _read(self, prompt: str) -> str | None:
        try:
            return input(prompt).strip()
        except EOFError:
            return None

    def _ask(self, text: str) -> str | None:
        """Show both answers and take a vote; returns the line that comes next."""
        try:
            with self._growing() as shown:
                exchange = self.talk.ask(text, shown)
        except ModelError as problem:
            self.say(f"  {problem}")
            return self._read("\nyou> ")
        except KeyboardInterrupt:
            self.say("  stopped")
            return self._read("\nyou> ")
        self._show(exchange)
        line = self._read("\nbetter? 1 left, 2 right, = neither, or your next turn> ")
        if line in _KEYS:
            self._vote(exchange, _KEYS[line])
            return self._read("\nyou> ")
        return line

    def _vote(self, exchange: Exchange, place: int | None) -> None:
        pair = self.talk.vote(exchange, place)
        if pair is not None:
            self.votes.add(pair)
        left, right = exchange.order
        who = f" (left: {left}, right: {right})" if self.talk.blind else ""
        what = "the answers are the same, so there is nothing to learn" if exchange.same else "no preference"
        self.say(f"  {f'kept as pair {self.votes.count}' if pair is not None else what}{who}")

    def _headings(self, order: tuple[str, str]) -> tuple[str, str]:
        return ("left", "right") if self.talk.blind else order

    @contextmanager
    def _growing(self) -> Iterator[_GrowingTexts]:
        """Answers as they grow, on a terminal; elsewhere they are printed once they are complete."""
        shown = _GrowingTexts(self._headings(("base", "trained")))
        if not self.console.is_terminal:
            yield shown
            return
        with Live(console=self.console, transient=True, refresh_per_second=12, vertical_overflow="ellipsis") as live:
            shown.live = live
            yield shown

    def _show(self, exchange: Exchange) -> None:
        left, right = exchange.order
        texts = [exchange.answers[side].text for side in exchange.order]
        first, second = marked(exchange.answers["base"].text, exchange.answers["trained"].text)
        pieces = {"base": first, "trained": second}
        heads = self._headings(exchange.order)
        if self.console.is_terminal:
            # Colours would tell the sides of a blind vote apart.
            self.console.print(_side_by_side(heads, (pieces[left], pieces[right]), exchange.order, self.talk.blind))
        else:
            for heading, text in zip(heads, texts, strict=True):
                self.say(f"{heading}: {text}")
        cut = [head for head, side in zip(heads, exchange.order, strict=True) if not exchange.answers[side].finished]
        if cut:
            self.say(f"  cut at {self.talk.opened.decoding.max_new_tokens} tokens: {' and '.join(cut)}")

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "new":
            self.talk.start_over()
            self.say("  a new conversation")
        elif name == "system":
            self.talk.start_over(rest)
            self.say(f"  system prompt: {self.talk.system or 'none'}; a new conversation")
        elif name == "blind" and rest in ("on", "off"):
            self.talk.blind = rest == "on"
            self.say(f"  sides are {'shuffled' if self.talk.blind else 'base on the left, trained on the right'}")
        elif name == "set" and len(rest.split()) == 2:
            try:
                self.talk.set(*rest.split())
                self.say(f"  {how_drawn(self.talk.opened)}, at most {self.talk.opened.decoding.max_new_tokens} tokens")
            except ModelError as problem:
                self.say(f"  {problem}")
        else:
            self.console.print(HELP, markup=False, highlight=False)


class _GrowingTexts:
    """Both texts so far, drawn again with each token."""

    def __init__(self, headings: tuple[str, str]) -> None:
        self.headings, self.texts = headings, ["", ""]
        self.live: Live | None = None

    def __call__(self, place: int, text: str) -> None:
        self.texts[place] = text
        if self.live is not None:
            pieces = tuple((Piece(text, False),) for text in self.texts)
            self.live.update(_side_by_side(self.headings, pieces, ("base", "trained"), plain=True))


def _side_by_side(
    headings: tuple[str, str], pieces: tuple[tuple[Piece, ...], ...], order: tuple[str, str], plain: bool
) -> Table:
    table = Table(expand=True)
    for heading in headings:
        table.add_column(heading, ratio=1, overflow="fold")
    cells = [tuple(Piece(p.text, False) for p in side) if plain else side for side in pieces]
    table.add_row(*(styled(side, name) for side, name in zip(cells, order, strict=True)))
    return table
