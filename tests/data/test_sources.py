"""Files, folders and hub ids: every row in its place, and one error that names every bad one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preftree.data.formats import NO_MARGIN, NO_OPPOSITE, NO_PREFERENCE, NO_SCORES
from preftree.data.record import PreferencePair
from preftree.data.sources import Source, load_pairs, refuse_inside
from preftree.errors import DataError, SettingsError
from tests.support.files import WRITERS, write_csv, write_jsonl, write_parquet

Row = dict[str, Any]
ROWS: list[Row] = [
    {"system": "S", "question": f'q{i}, "quoted"\nnext line', "chosen": f"good {i} ü", "rejected": f"bad {i}"}
    for i in range(5)
]


def triples(pairs: list[PreferencePair]) -> list[tuple[str | None, ...]]:
    return [(p.system, p.turns[-1].content, p.chosen, p.rejected) for p in pairs]


def problems_of(name: Path | str, min_margin: float = 0.0, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_pairs(Source(str(name), **options), min_margin=min_margin)
    return caught.value.problems


@pytest.mark.parametrize("ending", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_in_order(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"pairs{ending}"
    WRITERS[ending](path, ROWS)
    loaded = load_pairs(str(path))
    assert triples(loaded) == [(r["system"], r["question"], r["chosen"], r["rejected"]) for r in ROWS]
    assert [p.source for p in loaded] == [f"pairs{ending}:{n}" for n in range(1, 6)]
    assert [p.row for p in loaded] == list(range(5))
    assert (loaded.format, loaded.files, loaded.rows) == ("Orca pairs", [str(path)], 5)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_messages_in_files(tmp_path: Path, ending: str) -> None:
    ask, yes, no = ({"role": r, "content": c} for r, c in [("user", "Hi"), ("assistant", "Y"), ("assistant", "N")])
    WRITERS[ending](tmp_path / f"m{ending}", [{"prompt": [ask], "chosen": [yes], "rejected": [no]}])
    (pair,) = load_pairs(str(tmp_path / f"m{ending}"))
    assert (pair.turns[0].content, pair.chosen, pair.rejected) == ("Hi", "Y", "N")


def test_trap_scrambled_pairs_50_real_rows_give_the_same_50_triples(samples: Path) -> None:
    # The 2023 script built sets of prompts, chosen and rejected and zipped them.
    path = samples / "pref" / "mixed_pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line][:50]
    loaded = load_pairs(str(path), limit=50)
    assert triples(loaded) == [(r["system"] or None, r["question"], r["chosen"], r["rejected"]) for r in rows]
    assert [p.source for p in loaded] == [f"mixed_pairs.jsonl:{n}" for n in range(1, 51)]


texts = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=6))
def test_trap_scrambled_pairs_any_texts_stay_rows_even_equal_ones(tmp_path: Path, rows: list[tuple[str, ...]]) -> None:
    twice = [dict(zip(("question", "chosen", "rejected"), row, strict=True)) for row in rows * 2]
    write_jsonl(tmp_path / "any.jsonl", twice)
    loaded = load_pairs(str(tmp_path / "any.jsonl"))
    assert [(p.turns[0].content, p.chosen, p.rejected) for p in loaded] == rows * 2


@pytest.mark.parametrize(
    ("name", "pairs", "known", "skipped"),
    [
        ("orca_pairs", 60, "Orca pairs", {}),
        ("mixed_pairs", 60, "Orca pairs", {}),
        ("conversational", 36, "TRL conversational", {}),
        ("ultrafeedback_scored", 50, "UltraFeedback", {NO_PREFERENCE: 10}),
    ],
)
def test_real_files(samples: Path, name: str, pairs: int, known: str, skipped: dict[str, int]) -> None:
    loaded = load_pairs(str(samples / "pref" / f"{name}.jsonl"))
    assert (len(loaded), loaded.format, dict(loaded.skipped)) == (pairs, known, skipped)


def test_real_file_without_rejected_says_so(samples: Path) -> None:
    (problem,) = problems_of(samples / "pref" / "openorca_questions.jsonl")
    assert "preference training also needs `rejected` answers" in problem


def test_real_kto_file_has_no_prompt_with_both_labels_and_says_so(samples: Path) -> None:
    (problem,) = problems_of(samples / "pref" / "kto_labelled.jsonl")
    assert "40 rows (KTO labels)" in problem
    assert NO_OPPOSITE in problem


def test_real_pairs_unrolled_to_kto_labels_come_back(samples: Path, tmp_path: Path) -> None:
    pairs = load_pairs(str(samples / "pref" / "orca_pairs.jsonl"))
    rows = []
    for pair in pairs:
        ask = {"system": pair.system, "prompt": pair.turns[0].content}
        rows += [
            ask | {"completion": pair.rejected, "label": False},
            ask | {"completion": pair.chosen, "label": True},
        ]
    write_jsonl(tmp_path / "kto.jsonl", rows)
    loaded = load_pairs(str(tmp_path / "kto.jsonl"))
    assert triples(loaded) == triples(pairs)
    assert loaded.format == "KTO labels"


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    lines = [
        good,
        "{not json",
        good,
        json.dumps(ROWS[1] | {"chosen": 5}),
        "[1]",
        "",
        json.dumps({"question": "q"}),
    ]
    path = tmp_path / "bad.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"question": "\xff"}\n')
    problems = problems_of(path)
    expected = {
        2: "it is not JSON (Expecting property name",
        4: "column `chosen` must be text or a list of messages. Got int (5)",
        5: "it must be an object with named columns. Got list",
        7: "it has no column `chosen`",
        8: "it is not UTF-8 text (byte 15)",
    }
    assert len(problems) == len(expected)
    for problem, (row, said) in zip(problems, expected.items(), strict=True):
        assert problem.startswith(f"{path} row {row}: ")
        assert said in problem


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_bad_value_in_other_files(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"x{ending}", [ROWS[0], ROWS[1] | {"rejected": None}])
    (problem,) = problems_of(tmp_path / f"x{ending}")
    assert f"x{ending} row 2: column `rejected` must be text" in problem
    assert "nothing (null)" in problem


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("e.jsonl", b"", "is empty"),
        ("e.jsonl", b"\n\n", "is empty"),
        ("e.json", b"[]", "is empty"),
        ("e.csv", b"question,chosen,rejected\n", "is empty"),
        ("e.json", b"[{]", "neither JSON nor one JSON object a line"),
        ("e.json", b"7", "must hold a list of objects. Got int"),
        ("e.csv", b"question,chosen,rejected\na,b\n", "row 1: it has 2 cells where the header has 3"),
        ("e.csv", b'question,chosen,rejected\na,b,"c\n', "its row 1 cannot be read as CSV"),
        ("e.parquet", b"PAR0", "cannot be read as Parquet"),
        ("e.txt", b"x", "its ending is none of .jsonl"),
        ("e.jsonl", b'{"question": "q", "chosen": "a", "rejectd": "b"}', "Did you mean rejected?"),
        ("e.csv", b"promt,chosen,rejected\nq,a,b\n", "Did you mean prompt?"),
        ("e.jsonl", b'{"question": "q", "chosen": "a"}', "it lacks `rejected`"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    (problem,) = problems_of(tmp_path / name)
    assert said in problem
    assert name in problem


def test_json_of_one_list_in_an_object_and_json_lines_under_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    write_jsonl(tmp_path / "b.json", ROWS)
    assert triples(load_pairs(str(tmp_path / "a.json"))) == triples(load_pairs(str(tmp_path / "b.json")))


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfquestion,chosen,rejected\nq,a,b\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode())
    assert len(load_pairs(str(tmp_path / "b.csv"))) == len(load_pairs(str(tmp_path / "b.jsonl"))) == 1


def test_folder_reads_its_split_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "b.jsonl", ROWS[:2])
    write_csv(tmp_path / "a.csv", ROWS[2:3])
    write_parquet(tmp_path / "sub" / "train-00000-of-00001.parquet", ROWS[3:])
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    (tmp_path / "README.md").write_text("about")
    loaded = load_pairs(str(tmp_path))
    assert [p.source for p in loaded] == [
        "a.csv:1", "b.jsonl:1", "b.jsonl:2",
        "sub/train-00000-of-00001.parquet:1", "sub/train-00000-of-00001.parquet:2",
    ]  # fmt: skip
    assert [p.row for p in loaded] == list(range(5))
    assert loaded.left_out == [str(tmp_path / "test.jsonl")]
    assert len(load_pairs(Source(str(tmp_path), split="test"))) == 5
    assert "no file of the split 'validation'. It has: test, train" in problems_of(tmp_path, split="validation")[0]


def test_folder_reports_the_problems_of_all_its_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [ROWS[0] | {"chosen": 1}])
    assert [Path(p.split(" row ")[0]).name for p in problems_of(tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_folder_without_data(tmp_path: Path) -> None:
    assert "holds no file that ends in .jsonl" in problems_of(tmp_path)[0]


def test_a_file_has_only_the_split_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert "has only the split train" in problems_of(tmp_path / "a.jsonl", split="validation")[0]


def test_path_that_does_not_exist_suggests_names_nearby(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "orca_pairs.jsonl", ROWS)
    assert "Did you mean orca_pairs.jsonl?" in problems_of(tmp_path / "orca_pair.jsonl")[0]
    assert "does not exist either" in problems_of(tmp_path / "none" / "x.jsonl")[0]


def test_limit_takes_the_first_and_stops_reading(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"broken": 1}])
    assert [p.row for p in load_pairs(str(tmp_path / "a.jsonl"), limit=3)] == [0, 1, 2]
    with pytest.raises(SettingsError, match=r"at least 1\. Got 0"):
        load_pairs(str(tmp_path / "a.jsonl"), limit=0)


def test_hub_rows_and_options(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    calls = hub(ROWS)
    options: dict[str, Any] = {"revision": "r", "cache_dir": "c", "token": "t"}
    loaded = load_pairs(Source("Some/pairs", config="cfg", split="train[:5]", download_again=True, **options))
    assert [p.source for p in loaded] == [f"Some/pairs:{n}" for n in range(1, 6)]
    assert loaded.format == "Orca pairs"
    ((name, passed),) = calls
    assert name == "Some/pairs"
    assert "trust_remote_code" not in passed
    assert passed == options | {
        "name": "cfg", "split": "train[:5]", "streaming": False, "download_mode": "force_redownload"
    }  # fmt: skip


def test_hub_that_cannot_be_reached_is_one_error_with_both_places(
    hub: Callable[[Any], list[tuple[Any, ...]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "orca_dpo_pairs").mkdir()
    monkeypatch.chdir(tmp_path)
    hub(ConnectionError("Couldn't reach 'orca_dpo_pair'"))
    (problem,) = problems_of("orca_dpo_pair")
    assert "There is no file or folder orca_dpo_pair. Did you mean orca_dpo_pairs?" in problem
    assert "ConnectionError: Couldn't reach" in problem
    assert "local file (.jsonl, .json, .csv, .parquet)" in problem


def test_without_a_network_the_real_client_answers_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr("preftree.io.hub.hub_reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    before = constants.HF_HUB_OFFLINE
    (problem,) = problems_of("Intel/orca_dpo_pairs", cache_dir=str(tmp_path))
    assert "Looked on the hub" in problem
    assert before == constants.HF_HUB_OFFLINE


def test_several_pairs_of_one_row_and_why_there_are_none(tmp_path: Path) -> None:
    answers = [{"text": f"a{score}", "score": score} for score in (1, 5, 3, 5)]
    rows = [{"prompt": "q", "responses": answers}, {"prompt": "r", "responses": answers[1::2]}]
    write_jsonl(tmp_path / "k.jsonl", rows)

    def found(**options: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
        loaded = load_pairs(str(tmp_path / "k.jsonl"), **options)
        assert {p.row for p in loaded} == {0}
        return [(p.chosen, p.rejected) for p in loaded], loaded.skipped

    assert found() == ([("a5", "a1")], {NO_PREFERENCE: 1})
    assert found(pair_rule="best_each")[0] == [("a5", "a1"), ("a5", "a3")]
    assert len(found(pair_rule="all")[0]) == 5
    assert found(pair_rule="all", min_margin=2) == ([("a5", "a1"), ("a5", "a1")], {NO_MARGIN: 1})
    write_jsonl(tmp_path / "k.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    (problem,) = problems_of(tmp_path / "k.jsonl", min_margin=1.0)
    assert NO_SCORES in problem


def test_what_is_written_must_not_lie_in_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for inside in ("data", "data/out", "data/a/b", "link/out", "out/../data/x", str(tmp_path / "data/out")):
        with pytest.raises(SettingsError, match="would be read as data next time"):
            refuse_inside("--output_dir", inside, "data")
    for name in ("data", "some/hub-id", "data.jsonl", None):
        refuse_inside("--output_dir", "database", name)
    refuse_inside("--output_dir", None, "data")


PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}


def test_what_datasets_saved_to_a_folder_is_read_by_the_library(tmp_path: Path) -> None:
    import datasets

    rows = [{**PAIR, "chosen": f"Hello {i}."} for i in range(7)]
    whole = datasets.Dataset.from_list(rows)
    whole.select([3, 1]).save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert [p.chosen for p in load_pairs(str(tmp_path / "one"))] == ["Hello 3.", "Hello 1."]
    datasets.DatasetDict(train=whole, test=whole.select([5])).save_to_disk(str(tmp_path / "splits"))
    train = load_pairs(str(tmp_path / "splits"))
    assert (len(train), train[0].source, train.left_out) == (7, "train:1", [str(tmp_path / "splits/test")])
    assert [p.chosen for p in load_pairs(Source(str(tmp_path / "splits"), split="test"))] == ["Hello 5."]
    (shard, *_) = sorted((tmp_path / "one").glob("*.arrow"))
    assert "name the folder that it lies in" in problems_of(shard)[0]
    shard.write_bytes(shard.read_bytes()[:50])
    assert "cannot be read as a data set that `datasets` saved" in problems_of(tmp_path / "one")[0]


def test_messages_that_arrow_filled_with_nulls_have_only_their_own_keys(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    other = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1}}}]}
    write_parquet(tmp_path / "calls.parquet", [{"prompt": "Hi", "chosen": [call], "rejected": [other]}])
    (pair,) = load_pairs(str(tmp_path / "calls.parquet"))
    assert json.loads(pair.chosen_keys)["tool_calls"] == call["tool_calls"]
    assert json.loads(pair.rejected_keys)["tool_calls"] == other["tool_calls"]


def test_what_the_hub_writes_about_data_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [PAIR])
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "README.md").write_text("about")
    loaded = load_pairs(str(tmp_path))
    assert [Path(name).suffix for name in loaded.files] == [".parquet"]
    assert loaded.left_out == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("more.jsonl.gz", "it is compressed: unpack it"),
        ("more.zip", "it is compressed: unpack it"),
        ("more.tsv", "convert it to one of .jsonl"),
        ("more.arrow", "without the dataset_info.json and state.json beside it"),
        ("more.jsonl", "a pointer of Git LFS and not the data"),
        ("more.parquet", "a pointer of Git LFS and not the data"),
    ],
)
def test_data_in_a_folder_that_is_not_read_is_refused(tmp_path: Path, name: str, said: str) -> None:
    """It would be missing from training without a word."""
    write_parquet(tmp_path / "train.parquet", [PAIR])
    (tmp_path / "notes.txt.gz").write_bytes(b"no data")
    assert len(load_pairs(str(tmp_path))) == 1
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n")
    (problem,) = problems_of(tmp_path)
    assert name in problem
    assert said in problem


def test_an_address_is_named_without_its_password() -> None:
    (problem,) = problems_of("https://me:secret@example.com/pairs.jsonl")
    assert problem.startswith("https://example.com/pairs.jsonl is an address")


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.jsonl")  # opening it would wait for a writer for ever
    assert "is a pipe or a device" in problems_of(tmp_path / "pairs.jsonl")[0]
    assert "holds no file that ends in" in problems_of(tmp_path)[0]
