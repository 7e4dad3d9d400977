"""The cache of token ids: the same as encoding, and missed by whatever would change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from transformers import PreTrainedTokenizerFast

from preftree.data import tokens
from preftree.data.encode import encode_pairs
from preftree.data.record import PreferencePair, Turn
from preftree.data.tokens import content_key, remembered_pairs
from preftree.io.cache import cache_root
from tests.support.tiny import word_tokenizer

LENGTHS = {"max_length": 60, "max_prompt_length": 40}
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
    "order": lambda pairs: pairs[::-1],
    "fewer": lambda pairs: pairs[:-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_texts_are_other_tokens(change: str, tokenizer: PreTrainedTokenizerFast) -> None:
    keys = {content_key(pairs, tokenizer, 60, 40) for pairs in (PAIRS, CHANGES[change](PAIRS))}
    assert len(keys) == 2


def test_lengths_and_tokenizer_are_in_the_key(tokenizer: PreTrainedTokenizerFast) -> None:
    keys = [content_key(PAIRS, tokenizer, *lengths) for lengths in ((60, 40), (61, 40), (60, 41))]
    tokenizer.chat_template = (tokenizer.chat_template or "") + " "
    keys.append(content_key(PAIRS, tokenizer, 60, 40))
    tokenizer.add_tokens(["w1000"])
    keys.append(content_key(PAIRS, tokenizer, 60, 40))
    assert len(set(keys)) == len(keys)


def test_nothing_is_lost_where_the_cache_cannot_be_written(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "file"))
    assert remembered_pairs(PAIRS, tokenizer, **LENGTHS) == (*encode_pairs(PAIRS, tokenizer, **LENGTHS), False)
