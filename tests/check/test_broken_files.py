"""Forty files that are broken, each in its own way: forty messages that name the place and what to do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preftree.cli import guarded

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "So."}
SCORES = {"score_chosen": 2, "score_rejected": 1}
KTO = {"prompt": "Why?", "completion": "So.", "label": True}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet as format  # type: ignore[import-untyped]

    sink = pa.BufferOutputStream()
    format.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


def parquet_of(names: list[str]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as format

    sink = pa.BufferOutputStream()
    format.write_table(pa.Table.from_arrays([pa.array(["x"]) for _ in names], names=names), sink)
    return bytes(sink.getvalue().to_pybytes())


GOOD = lines(PAIR)
CSV = b"prompt,chosen,rejected\n"

# name -> (what is in the file, pieces of the message)
BROKEN: dict[str, tuple[bytes | Callable[[], bytes], list[str]]] = {
    "empty.jsonl": (b"", ["is empty", "one preference pair a row"]),
    "blank.jsonl": (b"\n\n  \n", ["is empty"]),
    "empty.json": (b"", ["is empty"]),
    "empty-list.json": (b"[]", ["is empty"]),
    "empty.csv": (b"", ["is empty"]),
    "header-only.csv": (CSV, ["is empty"]),
    "no-rows.parquet": (lambda: parquet([PAIR])[:0], ["cannot be read as Parquet"]),
    "cut.jsonl": (GOOD + GOOD[:25], ["row 2", "not JSON", "Unterminated string"]),
    "comma.jsonl": (GOOD + b'{"prompt": "x",}\n', ["row 2", "not JSON"]),
    "quotes.jsonl": (GOOD + b"{'prompt': 'x'}\n", ["row 2", "not JSON", "double quotes"]),
    "two-on-a-line.jsonl": (GOOD + GOOD.strip() + GOOD, ["row 2", "not JSON", "Extra data"]),
    "deep.jsonl": (GOOD + b'{"prompt": ' + b"[" * 100000 + b"\n", ["row 2", "nested too deeply"]),
    "huge-number.jsonl": (GOOD + b'{"prompt": ' + b"9" * 5000 + b"}\n", ["row 2", "cannot be read as JSON", "digits"]),
    "latin1.jsonl": (GOOD + '{"prompt": "é"}\n'.encode("latin-1"), ["row 2", "not UTF-8", "Save the file as UTF-8"]),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), ["UTF-16", "Save the file as UTF-8"]),
    "utf16-unmarked.jsonl": (GOOD.decode().encode("utf-16-le"), ["UTF-16", "Save the file as UTF-8"]),
    "utf16-unmarked.csv": (CSV.decode().encode("utf-16-be"), ["UTF-16"]),
    "utf32.jsonl": (GOOD.decode().encode("utf-32"), ["UTF-32"]),
    "mac.jsonl": (GOOD.replace(b"\n", b"\r") * 2, ["row 1", "Extra data", "needs a line of its own"]),
    "pretty.jsonl": (
        json.dumps(PAIR, indent=1).encode(),
        ["does not close it", "name a file with one JSON value .json"],
    ),
    "semicolons.csv": (CSV.replace(b",", b";"), ["parted by ';'", "Save it with commas"]),
    "tabs.csv": (CSV.replace(b",", b"\t") + b"a\tb\tc\n", ["parted by '\\t'"]),
    "twice.csv": (b"prompt,chosen,rejected,chosen\na,b,c,d\n", ["several columns named `chosen`", "Rename"]),
    "twice.parquet": (
        lambda: parquet_of(["prompt", "prompt", "chosen", "rejected"]),
        ["several columns named `prompt`"],
    ),
    "binary.parquet": (lambda: parquet([{**PAIR, "chosen": b"\xff"}]), ["row 1", "`chosen` must be text", "Got bytes"]),
    "nan.jsonl": (lines(PAIR | SCORES, {**PAIR, **SCORES, "score_chosen": float("nan")}), ["row 2", "Got float (nan)"]),
    "comma-score.jsonl": (lines(PAIR | SCORES, {**PAIR, **SCORES, "score_chosen": "4,5"}), ["row 2", "be a number"]),
    "columns.json": (json.dumps({k: [v] for k, v in PAIR.items()}).encode(), ["row 1", "`prompt`, message 1 must be"]),
    "nulls.jsonl": (
        lines({"prompt": [None], "chosen": [{}], "rejected": None}),
        ["row 1", "`prompt`, message 1 must be an object. Got nothing (null)"],
    ),
    "zipped.jsonl": (gzip.compress(GOOD), ["compressed (gzip)", "Unpack it"]),
    "zipped.csv": (gzip.compress(CSV), ["compressed (gzip)"]),
    "utf16.json": ("[]".encode("utf-16"), ["UTF-16"]),
    "deep.json": (b"[" * 100000, ["neither JSON nor", "recursion"]),
    "array.jsonl": (GOOD + b"[1, 2]\n", ["row 2", "must be an object with named columns. Got list"]),
    "null.jsonl": (GOOD + b"null\n", ["row 2", "Got NoneType"]),
    "text.jsonl": (b"This is no data.\n", ["row 1", "not JSON"]),
    "number.json": (b"5", ["must hold a list of objects. Got int"]),
    "words.json": (b"Hello\nthere", ["neither JSON nor one JSON object a line"]),
    "strings.json": (b'["a", "b"]', ["row 1", "Got str"]),
    "ragged.csv": (CSV + b"a,b,c\nd,e\n", ["row 2", "2 cells where the header has 3"]),
    "open-quote.csv": (CSV + b'a,b,c\n"d,e,f\n', ["row 2", "cannot be read as CSV"]),
    "latin1.csv": (CSV + "a,b,é\n".encode("latin-1"), ["cannot be read as CSV in UTF-8"]),
    "no-header.csv": (
        b"Why?,So.,No.\nWho?,I.,You.\n",
        ["no known preference format", "Rename or add columns"],
    ),
    "not.parquet": (b"PAR1 it is not", ["cannot be read as Parquet", "Is it whole"]),
    "cut.parquet": (lambda: parquet([PAIR])[:200], ["cannot be read as Parquet"]),
    "data.txt": (GOOD, ["its ending is none of .jsonl, .json, .csv, .parquet"]),
    "no-rejected.jsonl": (lines({"prompt": "x", "chosen": "y"}), ["no known preference format", "lacks `rejected`"]),
    "misspelt.jsonl": (lines({"prompt": "x", "chosen": "y", "rejcted": "z"}), ["Did you mean rejected?"]),
    "answers-only.jsonl": (lines({"question": "x", "response": "y"}), ["one answer to each question"]),
    "a-row-short.jsonl": (GOOD + lines({"prompt": "x", "chosen": "y"}), ["row 2", "no column `rejected`"]),
    "number-answer.jsonl": (GOOD + lines({**PAIR, "chosen": 5}), ["row 2", "`chosen` must be text", "Got int (5)"]),
    "null-answer.jsonl": (GOOD + lines({**PAIR, "rejected": None}), ["row 2", "Got nothing (null)"]),
    "messages.jsonl": (
        lines({"prompt": [ASK], "chosen": [SAY], "rejected": [{"role": "assistant", "content": None}]}),
        ["row 1", "column `rejected`, message 1: `content` must be text"],
    ),
    "roles.jsonl": (
        lines({"prompt": [ASK], "chosen": [SAY], "rejected": [ASK]}),
        ["row 1", "must be a conversation that ends with the assistant's answer"],
    ),
    "score.jsonl": (
        lines({**PAIR, **SCORES}, {**PAIR, **SCORES, "score_chosen": "good"}),
        ["row 2", "be a number"],
    ),
    "label.jsonl": (lines(KTO, {**KTO, "label": "maybe"}), ["row 2", "`label` must be true or false"]),
    "ranks.jsonl": (
        lines({"prompt": "x", "responses": ["a", "b"], "ranks": [1]}),
        ["row 1", "`ranks` must hold 2 values"],
    ),
    "hh.jsonl": (
        lines(
            {k: f"\n\nHuman: Hi\n\nAssistant: {k}" for k in ("chosen", "rejected")}, {"chosen": "Hi", "rejected": "Hi"}
        ),
        ["row 2", 'must begin with "Human:"'],
    ),
    "tools.jsonl": (
        lines({"input": {"messages": [ASK], "tools": "x"}, "preferred_output": [SAY], "non_preferred_output": [SAY]}),
        ["row 1", "`input.tools` is text and not JSON"],
    ),
}


def test_there_are_forty() -> None:
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_a_clear_message(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, pieces = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content())

    from preftree.check.run import main

    code = guarded(lambda: main([str(path)]))
    output = capsys.readouterr()
    said = output.out + output.err
    assert code in (1, 2)  # spoiled rows in a file that can be read, or nothing that can be read
    assert "Traceback" not in said
    for piece in pieces:
        assert piece in said, (piece, said)
    assert name in said


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("https://host/pairs.jsonl", "is an address, and only files, folders and hub ids are read: download it"),
        ("{there}/link.jsonl", "is a link to {there}/gone.jsonl, which is not there"),
        ("{there}/none.jsonl", "There is no file or folder"),
        ("{there}", "pairs.jsonl.gz: it is not read: it is compressed: unpack it."),
        ("{there}/pairs.jsonl.gz", "its ending is none of"),
    ],
)
def test_a_name_of_nothing_that_can_be_read(
    tmp_path: Path, name: str, piece: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(GOOD))
    from preftree.check.run import main

    assert guarded(lambda: main([name.format(there=tmp_path)])) == 2
    assert piece.format(there=tmp_path) in capsys.readouterr().err


def test_a_file_that_the_system_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission; root, as whom tests may run, has every permission."""
    from preftree.data.files import READERS

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").write_bytes(GOOD)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for ending in (".jsonl", ".json", ".csv"):
        ((number, problem),) = READERS[ending](tmp_path / "a")
        assert number == 0
        assert "cannot be read (Permission denied)" in str(problem)


def test_all_messages_of_a_folder_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cut.jsonl", "score.jsonl", "no-rejected.jsonl", "not.parquet"):
        content = BROKEN[name][0]
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content())
    from preftree.check.run import main

    assert guarded(lambda: main([str(tmp_path), "--json"])) == 1
    report = json.loads(capsys.readouterr().out)
    assert len(report["problems"]) == 4
    assert report["findings"][0]["count"] >= 2
