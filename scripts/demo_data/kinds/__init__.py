"""The demo's prompts: seventeen kinds whose right answer a program can check.

    extract.py   find one thing in a text: an email address, a date, a name, two fields as JSON
    form.py      obey a form: bullets, semicolons, a number of words or sentences, case, the same words
    reason.py    know or work out a word or number, and say nothing else
    pools.py     the texts and words that fill the wordings, apart for training and held-out prompts

To add a kind, write its wordings and its `fill` in one of these files and name it in `KINDS`.
"""

from __future__ import annotations

import random

from preftree.demo.rows import Split
from scripts.demo_data.kinds.base import Example, Kind, draw
from scripts.demo_data.kinds.extract import DATE, EMAIL, JSON, NAME
from scripts.demo_data.kinds.form import BULLETS, LOWERCASE, REPEAT, SEMICOLONS, SENTENCES, UPPERCASE, WORD_COUNT
from scripts.demo_data.kinds.reason import ARITHMETIC, ODD_ONE, OPPOSITE, SORT, UNITS, YES_NO

KINDS: tuple[Kind, ...] = (
    EMAIL,
    DATE,
    NAME,
    JSON,
    BULLETS,
    SEMICOLONS,
    WORD_COUNT,
    LOWERCASE,
    UPPERCASE,
    REPEAT,
    SENTENCES,
    YES_NO,
    ODD_ONE,
    OPPOSITE,
    SORT,
    ARITHMETIC,
    UNITS,
)


def make_examples(split: Split, per_kind: int, seed: int = 0) -> list[Example]:
    """`per_kind` prompts of every kind, shuffled so that a batch mixes kinds; equal seeds, equal list."""
    examples = [example for kind in KINDS for example in draw(kind, split, per_kind, seed)]
    random.Random(f"{seed}/{split}").shuffle(examples)
    return examples


__all__ = ["KINDS", "Example", "Kind", "make_examples"]
