"""What the demo shows of its results, and what it says to do next."""

from __future__ import annotations

import shlex

import pytest

from preftree.config.answers import parse_chat
from preftree.config.check import parse_check_settings
from preftree.config.evaluate import parse_evaluate
from preftree.config.train import parse_settings
from preftree.demo.run import next_commands, showcase

KINDS = ["sort", "sort", "email", "date", "units"]
# What became of each prompt: passed before, passes after.
WON, LOST, NEVER, ALWAYS = (False, True), (True, False), (False, False), (True, True)


@pytest.mark.parametrize(
    ("fates", "shown"),
    [
        ([WON, WON, NEVER, WON, LOST], [0, 3, 4]),  # two kinds that got better, and the one that got worse
        ([ALWAYS, WON, NEVER, WON, NEVER], [1, 3, 2]),
        ([WON, WON, ALWAYS, NEVER, ALWAYS], [0, 1, 3]),  # of one kind, where there is no other
        ([NEVER, ALWAYS, WON, ALWAYS, ALWAYS], [2, 0]),
        ([WON, ALWAYS, WON, WON, ALWAYS], [0, 2]),
        ([ALWAYS] * 5, []),
    ],
)
def test_two_that_got_better_and_one_that_did_not(fates: list[tuple[bool, bool]], shown: list[int]) -> None:
    before, after = zip(*fates, strict=True)
    assert showcase(KINDS, before, after) == shown


def test_the_next_commands_are_commands() -> None:
    chat, evaluate, check, train = (shlex.split(command) for command in next_commands("outputs/the demo"))
    assert parse_chat(chat[2:]).run == "outputs/the demo"
    assert [words[:2] for words in (evaluate, check, train)] == [
        ["preftree", "evaluate"], ["preftree", "check"], ["preftree", "train"]
    ]  # fmt: skip
    assert parse_evaluate(evaluate[2:]).adapter == "outputs/the demo"
    assert parse_check_settings(check[2:]).show == 3
    assert parse_settings(train[2:]).train.output_dir == "outputs/mine"
