"""Where validation pairs come from, and that no prompt is on both sides."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from preftree.config.train import parse_settings
from preftree.data.encode import EncodedPair
from preftree.data.split import split_validation
from preftree.errors import DataError
from preftree.train.inputs import EncodedSplits, prepare_pairs
from tests.support import tiny


def write(path: Path, prompts: list[int]) -> Path:
    rows = [{"system": "", "question": f" w{p}", "chosen": " w20 w21", "rejected": " w22"} for p in prompts]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prepared(*flags: str) -> tuple[EncodedSplits, list[str]]:
    screen = io.StringIO()
    options = parse_settings(["--model_name_or_path", "x", "--output_dir", "y", "--use_cpu", "true", *flags])
    found = prepare_pairs(options, tiny.word_tokenizer(), Console(file=screen))
    return found, screen.getvalue().splitlines()


def test_a_share_of_the_pairs(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", list(range(10, 20)))
    found, said = prepared("--dataset_name", str(data), "--validation_split_percentage", "20")
    assert (len(found.train), len(found.validation)) == (8, 2)
    assert any("20 % of the pairs" in line for line in said)


def test_a_folder_brings_its_own_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [10, 11, 12])
    write(tmp_path / "validation.jsonl", [13])
    found, said = prepared("--dataset_name", str(tmp_path))
    assert (len(found.train), len(found.validation)) == (3, 1)
    assert any("the validation split of" in line for line in said)


def test_a_validation_file_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [10, 11, 12])
    write(tmp_path / "validation.jsonl", [13])
    other = write(tmp_path.parent / "other.jsonl", [14, 15])
    found, _ = prepared("--dataset_name", str(tmp_path), "--validation_file", str(other))
    assert len(found.validation) == 2


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    rows = [{"question": " w10", "chosen": " w11", "rejected": " w11"}]
    data = tmp_path / "same.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="no pair is left"):
        prepared("--dataset_name", str(data))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 12), max_size=40),
    st.floats(0, 60),
    st.integers(0, 3),
)
def test_no_prompt_on_both_sides_and_no_pair_lost(prompts: list[int], percentage: float, seed: int) -> None:
    pairs = [EncodedPair((p,), (1, 2), (3, 2), row, "t") for row, p in enumerate(prompts)]
    train, held = split_validation(pairs, percentage, seed)
    assert sorted(p.row for p in train + held) == list(range(len(pairs)))
    assert not {p.prompt_ids for p in train} & {p.prompt_ids for p in held}
    assert [p.row for p in train] == sorted(p.row for p in train)
    if len(set(prompts)) > 1 and percentage > 0:
        assert held
    if pairs:
        assert train
