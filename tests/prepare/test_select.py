"""The selection: quotas against a slow count, counts of what was removed, and what it must not depend on."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftree.config.prepare import SelectSettings, SourceSettings
from preftree.data.chat import Chat
from preftree.errors import DataError
from preftree.prepare.scan import DUPLICATE, REFUSAL
from preftree.prepare.select import (
    ANSWER_LONG,
    NEAR_DUPLICATE,
    PROMPT_LONG,
    Examiner,
    Passes,
    Selection,
    allocate,
    benchmark_questions,
    select,
)
from preftree.prepare.source import NO_ANSWER, NO_QUESTION, UNREADABLE, SourceRow, find_places
from preftree.prepare.workers import InProcess
from preftree.text.overlap import OverlapIndex
from tests.support import tiny
from tests.support.prepare import Backwards, rows, write


def chosen(path: Path | str, workers=None, tests=(), **options: Any) -> Selection:
    places = find_places(SourceSettings(dataset_name=str(path)))
    tokenizer = tiny.word_tokenizer("{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}")
    settings = SelectSettings(**{"num_samples": 50, **options})
    examiner = partial(Examiner, settings, Chat(tokenizer), OverlapIndex(tests))
    return select(Passes(places, workers or InProcess()), settings, examiner)


def kind(row: Any) -> tuple[str, str]:
    return row.family, row.system


# --- how many of each -----------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 50), max_size=8), total=st.integers(0, 300))
def test_allocations(sizes: list[int], total: int) -> None:
    array = np.array(sizes, dtype=np.int64)
    for how in ("proportional", "equal"):
        given = allocate(array, total, how).tolist()
        assert sum(given) == min(total, sum(sizes))
        assert all(0 <= g <= size for g, size in zip(given, sizes, strict=True))
        if how == "proportional" and total <= sum(sizes):
            assert all(abs(g - size * total / sum(sizes)) < 1 for g, size in zip(given, sizes, strict=True) if size)
        if how == "equal":
            full = [g for g, size in zip(given, sizes, strict=True) if g < size]
            assert max(full, default=0) - min(full, default=0) <= 1
            assert all(g <= min(full) + 1 for g, size in zip(given, sizes, strict=True) if full and g == size)


def test_each_stratum_has_its_share(tmp_path: Path) -> None:
    source = rows(600)
    selection = chosen(write(tmp_path / "a.jsonl", source), num_samples=100)
    there = Counter((row["id"].split(".")[0], row["system_prompt"]) for row in source)
    assert selection.strata == len(there) == 12
    for name, count in Counter(map(kind, selection.rows)).items():
        assert abs(count - there[name] / 6) < 1.5, name
    equal = Counter(map(kind, chosen(tmp_path / "a.jsonl", num_samples=60, allocation="equal").rows))
    assert set(equal.values()) == {5}
    plain = chosen(tmp_path / "a.jsonl", num_samples=100, stratify_by=["none"])
    assert plain.strata == 1
    assert len(plain.rows) == 100


def test_what_one_stratum_lacks_the_others_give(tmp_path: Path) -> None:
    source = rows(300)
    for row in source:
        if row["id"].startswith("t0"):
            row["response"] = " ".join(["w40"] * 50)  # too long: the whole stratum fails when it is examined
    selection = chosen(
        write(tmp_path / "a.jsonl", source), num_samples=100, stratify_by=["family"], max_answer_length=9
    )
    assert len(selection.rows) == 100
    assert selection.rejected == {ANSWER_LONG: sum(row["id"].startswith("t0") for row in source)}
    assert selection.examined == 100 + selection.rejected.total()


# --- what is removed, and why ---------------------------------------------------------------------


def test_each_removal_has_its_reason(tmp_path: Path) -> None:
    good = rows(40)
    refusing = {**rows(1, seed=5)[0], "response": "I'm sorry, but I cannot help with that."}
    bad = [
        "{ torn",
        "[1]",
        {**good[0], "question": "  "},
        {**good[1], "question": None},
        {**good[2], "response": ""},
        {**good[3], "id": "flan.again", "question": "  " + good[3]["question"].replace(" ", "  ")},
        refusing,
        {**rows(1, seed=6)[0], "question": " ".join(["w30"] * 40)},
        {**rows(1, seed=7)[0], "response": " ".join(["w31"] * 40)},
        {**good[4], "id": "flan.near", "question": good[4]["question"] + " w29"},
    ]
    place = write(tmp_path / "a.jsonl", good + bad)
    selection = chosen(place, num_samples=90, max_prompt_length=30, max_answer_length=30, near_duplicates=0.7)
    expected = {UNREADABLE: 2, NO_QUESTION: 2, NO_ANSWER: 1, DUPLICATE: 1, REFUSAL: 1}
    assert selection.removed == expected
    assert selection.rejected == {PROMPT_LONG: 1, ANSWER_LONG: 1, NEAR_DUPLICATE: 1}
    assert selection.source_rows == 50
    assert len(selection.rows) == 40
    assert selection.examined == 43
    kept = chosen(place, num_samples=90, near_duplicates=0, keep_refusals=True)
    assert len(kept.rows) == 44
    assert REFUSAL not in kept.removed


def test_rows_with_test_questions_are_removed(tmp_path: Path, samples: Path) -> None:
    tests = list(benchmark_questions(str(samples / "eval"), lambda _: None))
    by_name = {question.benchmark: question for question in tests if len(question.text.split()) > 20}
    assert set(by_name) >= {"ARC", "HellaSwag", "MMLU"}
    source = rows(30)
    for row, question in zip(source, by_name.values(), strict=False):
        row["question"] = f"Please answer. {question.text.upper()} Thank you!"
    selection = chosen(write(tmp_path / "a.jsonl", source), tests=tests, max_prompt_length=2000)
    assert selection.rejected == {f"it holds a test question of {name}": 1 for name in by_name}
    assert len(selection.rows) == 30 - len(by_name)


def test_a_folder_without_test_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no test question"):
        list(benchmark_questions(str(tmp_path), lambda _: None))


# --- what it must not depend on -------------------------------------------------------------------


def test_equal_seeds_and_only_those_give_equal_selections(tmp_path: Path) -> None:
    place = write(tmp_path / "a.jsonl", rows(300))
    assert chosen(place) == chosen(place) == chosen(place, workers=Backwards())
    assert {row.key for row in chosen(place).rows} != {row.key for row in chosen(place, seed=1).rows}


def test_files_and_their_formats_do_not_matter(tmp_path: Path) -> None:
    source = rows(300)
    whole = chosen(write(tmp_path / "a.jsonl", source))
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "2.jsonl", source[:100])
    with open(parts / "1.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(source[0]))
        table.writeheader()
        table.writerows(source[100:180])
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(source[180:]), parts / "3.parquet")
    again = chosen(parts)
    assert [dataclasses.replace(row, place="") for row in again.rows] == [
        dataclasses.replace(row, place="") for row in whole.rows
    ]
    assert chosen(f"{parts}/*").rows == again.rows
    assert {row.place.partition(":")[0] for row in again.rows} == {"1.csv", "2.jsonl", "3.parquet"}


def test_how_many_candidates_are_read_at_once_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rows(300)
    for row in source[::3]:
        row["response"] = " ".join(["w40"] * 50)
    place = write(tmp_path / "a.jsonl", source)
    several = chosen(place, num_samples=90, max_answer_length=9)
    monkeypatch.setattr("preftree.prepare.select._MARGIN", 100.0)
    assert chosen(place, num_samples=90, max_answer_length=9) == several


def test_an_empty_system_column_is_no_system_message() -> None:
    """As in training: the template's own default stands there, not an empty turn."""
    template = "{% if messages[0]['role'] != 'system' %}w50 w51 w52 {% endif %}"
    chat = Chat(tiny.word_tokenizer(template + "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"))
    examine = Examiner(SelectSettings(num_samples=1), chat, OverlapIndex([]))
    row = SourceRow("id", "", "w30 w31", "w32", "other", "unknown", "place")
    assert examine([row]) == [("", 6, 1)]  # w50 w51 w52 w30 w31 <eos>


def test_a_selection_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    source = rows(60)
    source[0]["question"] = "w50 \ud83d\ude00 \u2028 w51"
    selection = chosen(write(tmp_path / "a.jsonl", source))
    selection.write(tmp_path / "s.jsonl")
    assert Selection.read(tmp_path / "s.jsonl") == selection


# --- columns --------------------------------------------------------------------------------------


def test_the_teacher_is_in_a_column_or_in_the_files_name(tmp_path: Path) -> None:
    folder = tmp_path / "orca"
    folder.mkdir()
    write(folder / "1M-GPT4-Augmented.jsonl", rows(20, seed=1))
    write(folder / "3_5M-GPT3_5-Augmented.jsonl", rows(30, seed=2))
    write(folder / "own.jsonl", [{**row, "generator": "GPT-4-0613"} for row in rows(10, seed=3)] + rows(5, seed=4))
    teachers = Counter(row.teacher for row in chosen(folder, num_samples=65).rows)
    assert teachers == {"gpt-4": 30, "gpt-3.5": 30, "unknown": 5}


def test_other_names_of_columns_and_rows_without_an_id(tmp_path: Path) -> None:
    place = write(tmp_path / "a.jsonl", [{"instruction": "w30 w31", "output": "w32", "system": "w33"}])
    (row,) = chosen(place).rows
    assert (row.system, row.question, row.chosen, row.id, row.family) == ("w33", "w30 w31", "w32", "a.jsonl:1", "other")


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "a.jsonl", [{"text": "w30", "label": 1}] * 3)
    with pytest.raises(DataError, match=r"no columns for question.*text, label"):
        chosen(place)
    with pytest.raises(DataError, match="No file fits the pattern"):
        chosen(tmp_path / "*.parquet")
