"""Pairs from rows in memory and from streams: the same as from a file, and no further ahead than asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from preftree.data.encode import EncodedPair, PairEncoder, encode_pairs
from preftree.data.formats import NO_OPPOSITE, PART_EARLY
from preftree.data.record import PreferencePair
from preftree.data.render import IDENTICAL
from preftree.data.rows import TOKEN_IDS, encode_stream, pairs_from_rows
from preftree.data.sources import load_pairs
from preftree.errors import DataError, SettingsError
from tests.support.chats import chat_tokenizer

Row = dict[str, Any]
HI, YES, NO = (
    {"role": role, "content": said} for role, said in (("user", "Hi?"), ("assistant", "Y"), ("assistant", "N"))
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
OTHER = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sub", "arguments": {"b": 1}}}]}
TABLES: dict[str, list[Row]] = {
    "standard": [{"prompt": f"q{i}", "chosen": "Y", "rejected": "N"} for i in range(3)],
    "standard, implicit": [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
    "conversational": [{"prompt": [HI], "chosen": [YES], "rejected": [NO]}],
    "conversational, implicit": [{"chosen": [HI, YES], "rejected": [HI, NO]}],
    "tools": [
        {"prompt": [HI], "chosen": [CALL], "rejected": [OTHER], "tools": [{"name": "add"}, {"name": "sub", "x": 1}]}
    ],
    "kwargs": [{"prompt": [HI], "chosen": [YES], "rejected": [NO], "chat_template_kwargs": {"enable_thinking": False}}],
    "ranked": [{"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 2.0]}],
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_every_kind_are_those_of_a_file(table: str, tmp_path: Path) -> None:
    rows = TABLES[table]
    (tmp_path / "made").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "made").rename(tmp_path / "made.jsonl")
    expected = load_pairs(str(tmp_path / "made.jsonl"))
    whole = datasets.Dataset.from_list(rows)
    for source in (rows, whole, whole.to_iterable_dataset()):
        found = pairs_from_rows(source, name="made.jsonl")
        assert list(found) == list(found) == found.load() == list(expected)
        assert (found.format, found.rows) == (expected.format, len(rows))


def test_nothing_is_read_ahead_of_need_and_a_pass_begins_anew() -> None:
    read: list[int] = []

    def rows() -> Iterator[Row]:
        for number in range(1000):
            read.append(number)
            yield {"prompt": f"q{number}", "chosen": "Y", "rejected": "N"}

    stream = datasets.IterableDataset.from_generator(rows)
    pairs = pairs_from_rows(stream)
    assert not read
    encoder = PairEncoder(chat_tokenizer("ChatML"), max_length=100)
    encoded = encode_stream(pairs, encoder, batch=2)
    assert [next(encoded).row for _ in range(3)] == [0, 1, 2]
    assert len(read) <= 12
    read.clear()
    assert [pair.row for pair, _ in zip(pairs, range(3), strict=False)] == [0, 1, 2]


def test_token_ids_are_taken_as_they_stand_and_cut() -> None:
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7]},
        {"prompt_ids": [5], "chosen_ids": [1], "rejected_ids": [1]},
    ]
    pairs = pairs_from_rows(datasets.Dataset.from_list(rows).with_format("numpy"), name="ids")
    assert next(iter(pairs)) == EncodedPair((5, 6), (7, 8, 9), (7,), 0, "ids:1")
    assert pairs.format == TOKEN_IDS
    encoder = PairEncoder(chat_tokenizer("ChatML"), max_length=40)
    assert list(encode_stream(pairs, encoder)) == [EncodedPair((5, 6), (7, 8, 9), (7,), 0, "ids:1")]
    assert encoder.report.dropped == {IDENTICAL: 1}
    with pytest.raises(DataError, match="ids row 1: column `chosen_ids` must be a list of token ids"):
        list(pairs_from_rows([rows[0] | {"chosen_ids": [1.5]}], name="ids"))


def test_labelled_answers_are_paired_as_they_come() -> None:
    rows = [
        ("p", "bad 1", False),
        ("q", "good", True),
        ("p", "good 1", True),
        ("p", "good 2", True),
        ("p", "bad 2", False),
    ]
    pairs = pairs_from_rows([dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows])
    made = [(p.chosen, p.rejected, p.row) for p in pairs if isinstance(p, PreferencePair)]
    assert made == [("good 1", "bad 1", 0), ("good 2", "bad 2", 3)]
    assert pairs.skipped == {NO_OPPOSITE: 1}


def test_problems_name_the_row_all_at_once_or_the_first_of_a_stream() -> None:
    rows: list[Any] = [*TABLES["standard"], {"prompt": "q", "chosen": 5, "rejected": "N"}, 7]
    with pytest.raises(DataError, match="train_dataset row 4: column `chosen` must be text"):
        list(pairs_from_rows(rows, name="train_dataset"))
    with pytest.raises(DataError, match="2 problems"):
        pairs_from_rows(rows, name="train_dataset").load()
    parted = pairs_from_rows([{"chosen": [HI, NO, HI, YES], "rejected": [HI, YES, HI, NO]}])
    with pytest.raises(DataError, match=f"1 rows .* not one gives a pair .*{PART_EARLY}"):
        parted.load()
    with pytest.raises(DataError, match="column `images` holds images"):
        list(pairs_from_rows([{"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]}]))
    for empty in ([], [{"text": "x"}]):
        with pytest.raises(DataError, match=r"is empty|no known preference format"):
            pairs_from_rows(empty).load()


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_is_kept_of_a_pair_that_is_too_long(mode: str) -> None:
    whole = EncodedPair(tuple(range(10, 20)), (1, 2, 3, 4), (5, 6), 0, "s")
    tokenizer = chat_tokenizer("ChatML")

    def cut(length: int | None, pair: EncodedPair = whole) -> Any:
        encoder = PairEncoder(tokenizer, max_length=length, truncation_mode=mode)
        (fate,) = encoder.encode([pair])
        return (
            (fate.encoded.prompt_ids, fate.encoded.chosen_ids, fate.encoded.rejected_ids)
            if fate.encoded
            else fate.reason
        )

    header = 11  # tokens that open the assistant's turn
    assert cut(None) == cut(14) == (whole.prompt_ids, whole.chosen_ids, whole.rejected_ids)
    if mode == "keep_start":
        assert cut(header + 1) == (whole.prompt_ids, (1, 2), (5, 6))
        long = EncodedPair(tuple(range(30)), (1,), (2,), 0, "s")
        assert cut(20, long) == "the prompt alone is as long as max_length"
    else:
        assert cut(header + 1) == (whole.prompt_ids[2:], whole.chosen_ids, whole.rejected_ids)
        long = EncodedPair((9,), tuple(range(100, 130)), (2,), 0, "s")
        assert cut(20, long) == ((9,), tuple(range(111, 130)), (2,))


def test_truncation_mode_has_two_values() -> None:
    with pytest.raises(SettingsError, match="truncation_mode must be keep_start or keep_end"):
        encode_pairs([], chat_tokenizer("ChatML"), max_length=30, truncation_mode="middle")
