"""A file that cannot be read: check, --fix, prepare and training say the same of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preftree.check.run import main
from preftree.cli import guarded
from preftree.data.sources import load_pairs
from preftree.errors import DataError
from tests.support.files import WRITERS

PAIRS = [{"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad number {n}."} for n in range(9)]


@pytest.fixture(params=["broken off", "no known columns"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with one sound file, and another with rows that nobody would get."""
    (tmp_path / "in").mkdir()
    WRITERS[".jsonl"](tmp_path / "in" / "a.jsonl", PAIRS)
    if request.param == "broken off":
        WRITERS[".parquet"](tmp_path / "in" / "b.parquet", PAIRS * 50)
        whole = (tmp_path / "in" / "b.parquet").read_bytes()
        (tmp_path / "in" / "b.parquet").write_bytes(whole[: len(whole) // 2])
    else:
        WRITERS[".jsonl"](tmp_path / "in" / "b.jsonl", [{"text": "Once upon a time."}])
    return tmp_path / "in"


def test_training_and_check_refuse_it_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError) as refused:
        load_pairs(str(folder))
    assert main([str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["spoiled"] is True
    assert "files that cannot be read" in report["verdict"]
    (found,) = (finding for finding in report["findings"] if finding["key"] == "unreadable_files")
    assert (found["count"], found["total"], found["unit"], found["level"]) == (1, 2, "files", "spoils")
    assert found["detail"].startswith("b.")
    assert report["problems"] == refused.value.problems


def test_fix_does_not_pass_the_rest_off_as_the_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder.parent / "out"
    assert guarded(lambda: main([str(folder), "--fix", str(target)])) == 1
    assert "nothing: repair or remove what cannot be read first (b." in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["in"]


@pytest.mark.parametrize("row", ['"never closed,b,c', 'a,"b"c,d'], ids=["a quote not closed", "words behind a quote"])
def test_a_csv_that_breaks_in_the_middle_loses_nothing(
    tmp_path: Path, row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows behind the break cannot be told apart: --fix writes nothing rather than the first half."""
    rows = [f'"Question {i}?","right, {i}","wrong, {i}"' for i in range(8)]
    source, target = tmp_path / "a.csv", tmp_path / "b.csv"
    source.write_text("\n".join(["prompt,chosen,rejected", *rows[:4], row, *rows[4:]]) + "\n")
    before = source.read_bytes()
    assert guarded(lambda: main([str(source), "--fix", str(target)])) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "files that cannot be read" in said
    assert "a.csv: its row 5 cannot be read as CSV in UTF-8" in said
    assert "Look for a quote that is not closed" in said
    assert "nothing: repair or remove what cannot be read first" in said
    assert not target.exists()
    assert source.read_bytes() == before
    with pytest.raises(DataError, match="its row 5 cannot be read as CSV"):
        load_pairs(str(source))


def test_a_file_that_breaks_off_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first rows are there, and then it is found out."""
    from preftree.data.files import READERS, RowProblem

    def broken(path: Path):
        yield from enumerate(PAIRS, start=1)
        yield 0, RowProblem("it breaks off")

    WRITERS[".jsonl"](tmp_path / "a.jsonl", PAIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, ".jsonl", broken)
        assert main([str(tmp_path / "a.jsonl"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == len(PAIRS)
    assert report["findings"][0]["count"] == 1
    assert "files that cannot be read" in report["verdict"]
