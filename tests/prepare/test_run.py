"""The command on a tiny model: what it leaves, what it goes on with, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftree.config.prepare import PrepareSettings, parse_settings
from preftree.data.sources import load_pairs
from preftree.prepare import journal
from preftree.prepare.card import _card_data, _size, text_histogram
from preftree.prepare.folder import PrepareFolder
from preftree.prepare.output import PAIR_COLUMNS
from tests.support import tiny
from tests.support.command import TEMPLATE
from tests.support.prepare import command, contents, flags, rows, write


def test_what_a_run_leaves(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = command(*flags(inputs, out, num_rejected=2))
    for piece in ("device cpu: asked for by --use_cpu", "precision float32", "note: nothing is removed for being"):
        assert piece in said
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert all(list(line) == list(PAIR_COLUMNS) for line in lines)
    source = {row["id"]: row for row in rows(60)}
    for line in lines:
        row = source[line["id"]]
        assert (line["system"], line["question"], line["chosen"]) == (
            row["system_prompt"],
            row["question"],
            row["response"],
        )
        assert line["family"] == line["id"].split(".")[0]
        assert line["place"] == f"source.jsonl:{int(line['id'].split('.')[1]) + 1}"
    assert max(Counter(line["id"] for line in lines).values()) == 2
    assert len({line["rejected_seed"] for line in lines}) == len(lines)
    manifest = yaml.safe_load((out / "manifest.yaml").read_text())
    assert manifest["counts"]["pairs"] == len(lines)
    assert manifest["counts"]["selected"] == 20
    assert len(lines) == 2 * 20 - sum(manifest["counts"]["given_up"].values())
    assert manifest["model"]["revision"].startswith("xxh3_128 ")
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"][0]["path"] == "train.jsonl"
    for piece in ("Not decontaminated", "## Lengths in tokens", "| pairs |"):
        assert piece in card


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_folder_is_what_the_hub_takes(inputs: Path, tmp_path: Path, ending: str) -> None:
    """As far as can be told without the hub: its own reader of cards, its own loader of data."""
    import datasets
    from huggingface_hub import DatasetCard

    out = tmp_path / "out"
    command(*flags(inputs, out, output_format=ending))
    front = DatasetCard.load(out / "README.md").data.to_dict()
    assert front["license"] == "unknown"
    assert front["task_categories"] == ["text-generation"]
    assert front["size_categories"] == ["n<1K"]
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    command(*flags(inputs, tmp_path / "lines"))
    lines = [json.loads(line) for line in (tmp_path / "lines/train.jsonl").read_text().splitlines()]
    assert loaded["train"].to_list() == lines


def test_what_the_card_says_to_the_hub() -> None:
    sizes = [0, 999, 1000, 12_000, 4_000_000, 10**12]
    assert [_size(pairs) for pairs in sizes] == [
        "n<1K", "n<1K", "1K<n<10K", "10K<n<100K", "1M<n<10M", "n>1T"
    ]  # fmt: skip
    assert _card_data("train.jsonl", 5, {"en": 95, "fr": 5, "no": 4}).language == ["en"]
    assert yaml.safe_load(_card_data("t", 5, {"no": 1}).to_yaml())["language"] == ["no"]  # not false
    assert "language" not in yaml.safe_load(_card_data("t", 5, {}).to_yaml())


def test_the_folder_is_a_dataset_for_training(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(*flags(inputs, out))
    loaded = load_pairs(str(out))
    assert loaded.files == [str(out / "train.jsonl")]
    assert len(loaded) == len((out / "train.jsonl").read_text().splitlines())


def test_parquet_holds_the_same(inputs: Path, tmp_path: Path) -> None:
    command(*flags(inputs, tmp_path / "a"))
    command(*flags(inputs, tmp_path / "b", output_format="parquet"))
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "b" / "train.parquet").to_pylist()
    assert table == [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]


def test_a_second_call_changes_nothing(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(*flags(inputs, out))
    before = contents(out)
    assert "is complete; nothing is left to do" in command(*flags(inputs, out))
    assert contents(out) == before


@pytest.mark.parametrize("lost", ["manifest.yaml", "train.jsonl", ".prepare/answers.jsonl", ".prepare/selected.jsonl"])
def test_whatever_is_missing_is_made_again_alike(inputs: Path, tmp_path: Path, lost: str) -> None:
    out = tmp_path / "out"
    command(*flags(inputs, out))
    before = contents(out)
    (out / lost).unlink()
    (out / "manifest.yaml").unlink(missing_ok=True)  # a run that was killed has none
    command(*flags(inputs, out))
    assert contents(out) == before


@pytest.mark.parametrize("content", [b"{", b"\xff\n", b"{}\n", b"", None])
@pytest.mark.parametrize("name", ["state.json", "selected.jsonl", "answers.jsonl"])
def test_what_was_damaged_is_named(inputs: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    """Or made again alike: what is missing, but for what was asked for; and a journal whose last line is torn."""
    out, damaged = tmp_path / "out", tmp_path / "out/.prepare" / name
    command(*flags(inputs, out, num_samples=2))
    before = contents(out)
    (out / "manifest.yaml").unlink()
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    made_again = {"state.json": (), "selected.jsonl": (None,), "answers.jsonl": (b"{", b"", None)}[name]
    if content in made_again:
        command(*flags(inputs, out, num_samples=2))
        assert contents(out) == before
    else:
        said = command(*flags(inputs, out, num_samples=2), code=2)
        assert f".prepare/{name} is damaged" in said
        assert not (out / "manifest.yaml").exists()


def test_what_a_killed_process_was_writing_is_removed(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(*flags(inputs, out, num_samples=2))
    before = contents(out)
    (out / "manifest.yaml").unlink()
    for name in (".train.jsonl.0a.partial", ".prepare/.selected.jsonl.0b.partial"):
        (out / name).write_bytes(b"half")
    command(*flags(inputs, out, num_samples=2))
    assert contents(out) == before


def test_rows_that_cannot_be_read_are_shown(inputs: Path, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["{", *rows(9)])
    said = command(*flags(inputs, tmp_path / "out", dataset_name=tmp_path / "in.jsonl"))
    assert "− 1: the row cannot be read" in said
    assert "in.jsonl row 1: it is not JSON" in said
    assert f"next preftree check {tmp_path / 'out'}" in said


def test_a_file_that_cannot_be_read_is_refused_as_in_training(inputs: Path, tmp_path: Path) -> None:
    """Nobody knows how many rows are missing."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", rows(9))
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 it is not")
    said = command(*flags(inputs, tmp_path / "out", dataset_name=tmp_path / "in"), code=2)
    assert "b.parquet: it cannot be read as Parquet" in said
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_a_full_disk_is_one_message_and_costs_nothing_that_was_done(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    command(*flags(inputs, whole))
    real, units = journal.append_jsonl, []

    def full_after_one(*arguments: Any, **options: Any) -> None:
        units.append(arguments)
        if len(units) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(journal, "append_jsonl", full_after_one)
    said = command(*flags(inputs, out), code=2)
    assert "cannot be written (No space left on device). What was done is kept" in said
    monkeypatch.undo()
    command(*flags(inputs, out))
    assert contents(out) == contents(whole)


def test_other_settings_are_refused_by_name(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(*flags(inputs, out))
    before = contents(out)
    said = command(*flags(inputs, out, seed=7, temperature=0.5), code=2)
    assert "--seed was 42, now 7; --temperature was 0.7, now 0.5" in said
    assert contents(out) == before
    command(*flags(inputs, out, concurrency=3, timeout=9))  # without effect on the result


def test_another_model_under_the_same_name_is_refused(inputs: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    for seed in (0, 1):
        tiny.llama(seed=seed, num_hidden_layers=2).save_pretrained(model)
        tiny.word_tokenizer(TEMPLATE).save_pretrained(model)
        said = command(*flags(inputs, out, model_name_or_path=model), code=2 * seed)
    assert "the model was" in said


def test_what_is_written_is_not_to_be_read_as_data(inputs: Path, tmp_path: Path) -> None:
    for out in (inputs, inputs / "out"):
        said = command(*flags(inputs, out, dataset_name=inputs), code=2)
        assert "would be read as data next time" in said
    assert not (inputs / "out").exists()


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        ('{"question": 5,\n', "row 1: it is not JSON"),
        ('{"question": "w30 w31?", "response": null}\n', "Of these, nothing (null) is in response"),
    ],
)
def test_a_source_without_a_row_says_what_is_wrong_with_it(
    inputs: Path, tmp_path: Path, content: str, piece: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    assert piece in command(*flags(inputs, tmp_path / "out", dataset_name=tmp_path / "bad.jsonl"), code=2)
    (tmp_path / "wide.jsonl").write_text(content, encoding="utf-16")
    said = command(*flags(inputs, tmp_path / "out", dataset_name=tmp_path / "wide.jsonl"), code=2)
    assert "wide.jsonl: it is UTF-16" in said


def test_a_name_that_is_no_valid_text(inputs: Path, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"na\xffme.jsonl")
    write(name, rows(9))
    for _ in range(2):
        said = command(*flags(inputs, tmp_path / "out", dataset_name=name))
    assert "nothing is left to do" in said
    assert yaml.safe_load((tmp_path / "out/manifest.yaml").read_text("utf-8"))["source"]["name"] == str(name)


def test_a_mended_flag_needs_no_new_folder(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "There is no file" in command(*flags(inputs, out, dataset_name=tmp_path / "none.jsonl"), code=2)
    command(*flags(inputs, out))


def test_a_folder_of_someone_elses_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "holds other files (mine.txt)" in command(*flags(inputs, tmp_path), code=2)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_all_mistakes_are_told_at_once() -> None:
    said = command("--num_samples", "0", "--engine", "transformer", "--stratify_by", "familly", "--seeed", "3", code=2)
    for piece in (
        "--dataset_name is missing",
        "--num_samples must be at least 1",
        "Did you mean transformers?",
        "Did you mean family?",
        "--seeed is not a setting of preftree prepare. Did you mean --seed",
        "--output_dir is missing",
    ):
        assert piece in said


def test_the_secrets_are_nowhere(inputs: Path, tmp_path: Path) -> None:
    command(*flags(inputs, tmp_path / "out", token="hf_secret", base_url="http://inner.host/v1"))
    assert not any(word in content for content in contents(tmp_path).values() for word in (b"hf_secret", b"inner.host"))


def test_a_yaml_file_is_a_command_line(inputs: Path, tmp_path: Path) -> None:
    words = flags(inputs, tmp_path / "out")
    settings = dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings | {"stratify_by": ["family"]}))
    parsed = parse_settings([str(tmp_path / "settings.yaml"), "--seed", "3"])
    assert isinstance(parsed, PrepareSettings)
    assert (parsed.select.seed, parsed.select.stratify_by, parsed.select.num_samples) == (3, ["family"], 20)


def test_software_that_changed_is_told(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(*flags(inputs, out))
    folder = PrepareFolder(str(out), "jsonl")
    state = folder.state()
    state["environments"][0]["torch"] = "1.0"
    folder.state_path.write_text(json.dumps(state))
    folder.manifest.unlink()
    assert "began with other software or hardware" in command(*flags(inputs, out))
    assert len(yaml.safe_load(folder.manifest.read_text())["environments"]) == 2


def test_a_histogram_by_hand() -> None:
    assert text_histogram([]) == "(no rows)"
    assert text_histogram([1, 2, 3, 9]).splitlines() == [
        " 1-1  " + "█" * 20 + " " * 20 + "  1",
        " 2-3  " + "█" * 40 + "  2",
        " 4-7  " + " " * 40 + "  0",
        "8-15  " + "█" * 20 + " " * 20 + "  1",
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_hostile_texts_are_kept_as_they_are_and_never_obeyed(inputs: Path, tmp_path: Path, ending: str) -> None:
    evil = "\x1b[31m[bold]x[/nope]<script>|`# \u202e"
    source = [
        {**row, "system_prompt": evil, "teacher": evil, "response": f"{row['response']} {evil}"} for row in rows(9)
    ]
    source += [{**source[0], "question": f"w31 w32 w33 \ud83d {evil}", "id": f"{evil}.1"}, {evil: 1}]
    name = tmp_path / f"`# \x1b\u202e.{evil[-3:]}.jsonl"
    write(name, source)
    out = tmp_path / "out"
    said = command(*flags(inputs, out, dataset_name=name, max_prompt_length=90, output_format=ending))
    assert not set("\x1b\u202e") & set(said)
    loaded = load_pairs(str(out))
    assert {pair.system for pair in loaded} == {evil}
    (halved,) = {pair.turns[0].content for pair in loaded if pair.turns[0].content.startswith("w31 w32 w33")}
    assert halved == f"w31 w32 w33 \ufffd {evil}"
    card = (out / "README.md").read_text("utf-8")
    assert "<script" not in card
    assert not set("\x1b\u202e") & set(card)
    assert yaml.safe_load((out / "manifest.yaml").read_text("utf-8"))["counts"]["pairs"] == len(loaded)
