"""The cache of token ids: the same as encoding, and missed by whatever would change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import PreTrainedTokenizerFast

from preftree.data import tokens
from preftree.data.encode import encode_pairs
from preftree.data.record import PreferencePair, Turn
from preftree.data.tokens import content_key, remembered_pairs, written_dates
from preftree.io.cache import cache_root
from tests.support.tiny import word_tokenizer

LENGTHS: Any = {"max_length": 60, "max_prompt_length": 40, "truncation_mode": "keep_start"}
PAIRS = [
    PreferencePair(None, (Turn("user", f"w{n + 5} w20"),), f"w{n + 30} w31", f"w{n + 40} w41", "here", n)
    for n in range(5)
] + [PreferencePair("w50 w51", (Turn("user", "w52"),), "w53", "w53", "there", 9)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def test_a_second_call_reads_what_the_first_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = encode_pairs(PAIRS, tokenizer, **LENGTHS)
    assert remembered_pairs(PAIRS, tokenizer, **LENGTHS) == (*expected, False)
    with mock.patch.object(tokens, "encode_pairs", side_effect=AssertionError("encoded again")):
        assert remembered_pairs(PAIRS, tokenizer, **LENGTHS) == (*expected, True)
    assert remembered_pairs(PAIRS, tokenizer, **LENGTHS, afresh=True)[2] is False


def test_a_damaged_file_is_encoded_again(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = remembered_pairs(PAIRS, tokenizer, **LENGTHS)[:2]
    (file,) = cache_root().rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert remembered_pairs(PAIRS, tokenizer, **LENGTHS) == (*expected, False)
    assert remembered_pairs(PAIRS, tokenizer, **LENGTHS) == (*expected, True)
    assert not list(cache_root().rglob("*.writing"))


CHANGES: dict[str, Callable[[list[PreferencePair]], list[PreferencePair]]] = {
    "text": lambda pairs: [replace(pairs[0], chosen="w33"), *pairs[1:]],
    "system": lambda pairs: [replace(pairs[0], system=""), *pairs[1:]],
    "calls of an answer": lambda pairs: [replace(pairs[0], chosen_keys='{"tool_calls": []}'), *pairs[1:]],
    "keys of a turn": lambda pairs: [replace(pairs[0], turns=(Turn("user", "w5 w20", '{"name": "Ann"}'),)), *pairs[1:]],
    "tools": lambda pairs: [replace(pairs[0], tools='[{"name": "add"}]'), *pairs[1:]],
    "template kwargs": lambda pairs: [replace(pairs[0], template_kwargs='{"thinking": true}'), *pairs[1:]],
    "order": lambda pairs: pairs[::-1],
    "fewer": lambda pairs: pairs[:-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_texts_are_other_tokens(change: str, tokenizer: PreTrainedTokenizerFast) -> None:
    keys = {content_key(pairs, tokenizer, LENGTHS) for pairs in (PAIRS, CHANGES[change](PAIRS))}
    assert len(keys) == 2


def test_lengths_and_tokenizer_are_in_the_key(tokenizer: PreTrainedTokenizerFast) -> None:
    changes: tuple[Any, ...] = ({}, {"max_length": 61}, {"max_prompt_length": 41}, {"truncation_mode": "keep_end"})
    keys = [content_key(PAIRS, tokenizer, LENGTHS | change) for change in changes]
    tokenizer.chat_template = (tokenizer.chat_template or "") + " "
    keys.append(content_key(PAIRS, tokenizer, LENGTHS))
    tokenizer.add_tokens(["w1000"])
    keys.append(content_key(PAIRS, tokenizer, LENGTHS))
    assert len(set(keys)) == len(keys)


def test_nothing_is_lost_where_the_cache_cannot_be_written(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "file"))
    assert remembered_pairs(PAIRS, tokenizer, **LENGTHS) == (*encode_pairs(PAIRS, tokenizer, **LENGTHS), False)


DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %} {{ m.content }}{% endfor %}"


def test_a_template_that_writes_the_date_is_encoded_anew_the_next_day(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = DATED
    today = content_key(PAIRS, tokenizer, LENGTHS)
    assert today == content_key(PAIRS, tokenizer, LENGTHS)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(tokens, "datetime", Tomorrow)
    assert content_key(PAIRS, tokenizer, LENGTHS) != today


@pytest.mark.parametrize(
    ("template", "dates"),
    [
        ("plain", []),
        ("{{ strftime_now('%d %b %Y') }}", ["27 Nov 2026"]),
        ('{% if strftime_now is defined %}{{ strftime_now( "%Y-%m-%d" ) }}{% endif %}', ["2026-11-27"]),
        ("{{ strftime_now('%H:%M') }}", None),
        ("{{ strftime_now(format) }}", None),
        ("{{ strftime_now('%Y') }}{{ strftime_now('%c') }}", None),
        ("{{ ['a', 'b'] | random }}", None),
    ],
)
def test_what_templates_ask_the_clock_for(template: str, dates: list[str] | None) -> None:
    assert written_dates(template, datetime(2026, 11, 27, 12, 30)) == dates


def test_code_and_class_are_in_the_key(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(PreTrainedTokenizerFast):
        pass

    other = Other(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    other.chat_template = tokenizer.chat_template
    keys = {content_key(PAIRS, each, LENGTHS) for each in (tokenizer, other)}
    monkeypatch.setattr(tokens, "_code", lambda: b"other code")
    assert len(keys | {content_key(PAIRS, tokenizer, LENGTHS)}) == 3


def test_a_time_of_day_is_never_remembered(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = DATED.replace("%d %b %Y", "%H:%M:%S")
    for _ in range(2):
        assert remembered_pairs(PAIRS, tokenizer, **LENGTHS)[2] is False
