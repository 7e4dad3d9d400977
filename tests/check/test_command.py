"""The command as people and machines call it: exit codes, views, --fix."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preftree.check.fix import LOG
from preftree.check.run import main
from preftree.data.sources import load_pairs
from preftree.errors import DataError, PreftreeError, RunError, SettingsError
from tests.support.files import WRITERS

EVIL = "<script>alert(1)</script>[bold]x[/bold][/nope]"
GOOD: dict[str, Any] = {"question": "Why?", "chosen": "It is so.", "rejected": "No, never.", "note": EVIL}
ROWS: list[dict[str, Any]] = [
    GOOD,
    {**GOOD, "question": "Who?", "chosen": "caf\u00c3\u00a9 au lait"},
    {**GOOD, "question": "What?", "chosen": " "},
    GOOD,
    {**GOOD, "question": "When?", "chosen": "now", "rejected": "now"},
    {**GOOD, "question": "Where?", "chosen": "Here.", "rejected": "There."},
    {**GOOD, "question": "Where?", "chosen": "There.", "rejected": "Here."},
    {**GOOD, "question": EVIL, "rejected": "a\x07b"},
]
LEFT = [("Why?", "It is so.", "No, never."), ("Who?", "café au lait", "No, never."), (EVIL, "It is so.", "ab")]


def test_exit_codes_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [
        {"prompt": f"Which of them is number {i}?", "chosen": "x" * (5 + i % 3), "rejected": "y" * 6} for i in range(9)
    ]
    WRITERS[".jsonl"](tmp_path / "good.jsonl", good)
    assert main([str(tmp_path / "good.jsonl")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing was found in the texts. Tokens and the chat template were not looked at" in said
    WRITERS[".jsonl"](tmp_path / "bad.jsonl", ROWS)
    assert main([str(tmp_path / "bad.jsonl")]) == 1
    assert "would spoil training" in capsys.readouterr().out


def test_json_is_json_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS[".jsonl"](tmp_path / "bad.jsonl", ROWS)
    assert main([str(tmp_path / "bad.jsonl"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["spoiled"] is True
    found = {finding["key"]: finding for finding in report["findings"]}
    assert found["contradictory_pairs"]["rows"] == ["bad.jsonl:6", "bad.jsonl:7"]
    assert found["duplicate_pairs"] | {"what": "", "why": ""} == {
        "key": "duplicate_pairs",
        "level": "note",
        "what": "",
        "why": "",
        "count": 1,
        "total": 8,
        "share": 0.125,
        "unit": "pairs",
        "detail": "",
        "fix": "drop",
        "sampled": None,
        "rows": ["bad.jsonl:4"],
        "rows_in_all": 1,
        "examples": [{"row": "bad.jsonl:4", "text": "Why?"}],
    }


def test_html_escapes_and_loads_nothing(tmp_path: Path) -> None:
    name = tmp_path / "<b>&[red].jsonl"
    WRITERS[".jsonl"](name, [*ROWS, {**GOOD, "chosen": 5}])
    target = tmp_path / "report.html"
    assert main([str(name), "--html", str(target)]) == 1
    text = target.read_text(encoding="utf-8")
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;[red].jsonl" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("<svg") == 3
    with pytest.raises(SettingsError, match="exists already"):
        main([str(name), "--html", str(target)])


@pytest.mark.parametrize("ending", WRITERS)
def test_fix_writes_the_same_format_and_a_log(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = tmp_path / f"data{ending}", tmp_path / f"clean{ending}"
    WRITERS[ending](path, ROWS)
    before = path.read_bytes()
    assert main([str(path), "--fix", str(target)]) == 1
    assert path.read_bytes() == before
    assert [(p.turns[0].content, p.chosen, p.rejected) for p in load_pairs(str(target))] == LEFT
    log = [json.loads(line) for line in (tmp_path / f"clean{ending}{LOG}").read_text("utf-8").splitlines()]
    assert [(entry["row"].split(":")[1], entry["did"]) for entry in log] == [
        ("2", "repaired"),
        ("3", "dropped"),
        ("4", "dropped"),
        ("5", "dropped"),
        ("6", "dropped"),
        ("7", "dropped"),
        ("8", "repaired"),
    ]
    assert "empty" in log[1]["why"]
    assert "1 kept as they are, 2 repaired, 5 dropped" in capsys.readouterr().out
    # What is left has nothing more to fix, and other columns are still there.
    again = tmp_path / f"again{ending}"
    assert main([str(target), "--fix", str(again)]) in (0, 1)
    assert again.read_bytes() == target.read_bytes() or ending == ".parquet"
    if ending == ".csv":
        with target.open(encoding="utf-8", newline="") as file:
            assert next(csv.DictReader(file))["note"] == EVIL


def test_fix_of_jsonl_copies_bytes_and_drops_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    odd = b'{"chosen":"y\\u00e9s",   "rejected": "no", "question": "q1", "n": 1.50}'
    broken = b'\r\n\n{"broken\n{"question": "q2", "chosen": "a", "rejected": 3}\n'
    path.write_bytes(odd + broken + odd.replace(b"q1", b"q3"))
    assert main([str(path), "--fix", str(tmp_path / "out.jsonl")]) == 1
    assert (tmp_path / "out.jsonl").read_bytes() == odd + b"\n" + odd.replace(b"q1", b"q3") + b"\n"
    log = [json.loads(line) for line in (tmp_path / f"out.jsonl{LOG}").read_text("utf-8").splitlines()]
    assert [entry["row"] for entry in log] == ["data.jsonl:3", "data.jsonl:4"]
    assert "not JSON" in log[0]["why"]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_fix_keeps_lone_surrogates_where_it_repairs_nothing(tmp_path: Path, ending: str) -> None:
    odd = {**GOOD, "name \ud83d": 1}
    rows = [odd, {**odd, "question": "Who?", "chosen": "b\x07ell \ud83d"}, {**odd, "question": "When?", "chosen": ""}]
    text = json.dumps(rows) if ending == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"in{ending}").write_text(text)
    assert main([str(tmp_path / f"in{ending}"), "--fix", str(tmp_path / f"out{ending}")]) == 1
    fixed = (tmp_path / f"out{ending}").read_text("utf-8")
    kept = json.loads(fixed) if ending == ".json" else [json.loads(line) for line in fixed.splitlines()]
    assert kept == [odd, {**odd, "question": "Who?", "chosen": "bell "}]


def test_fix_of_a_folder_and_of_kto_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": text, "label": label} for text, label in (("a", True), ("a", False))]
    rows += [{"prompt": "r", "completion": text, "label": label} for text, label in (("a", True), ("b", False))]
    (tmp_path / "in/sub").mkdir(parents=True)
    WRITERS[".jsonl"](tmp_path / "in/sub/labels.jsonl", rows)
    WRITERS[".parquet"](tmp_path / "in/pairs.parquet", ROWS)
    assert main([str(tmp_path / "in"), "--fix", str(tmp_path / "out")]) == 1
    kept = [json.loads(line) for line in (tmp_path / "out/sub/labels.jsonl").read_text().splitlines()]
    assert kept == rows[2:]  # both rows of the identical pair are gone
    assert len(load_pairs(str(tmp_path / "out/pairs.parquet"))) == 3


def test_fix_keeps_a_row_with_sound_pairs_among_others(tmp_path: Path) -> None:
    answers = [{"text": text, "score": score} for text, score in (("best", 3), ("", 2), ("bad", 1))]
    rows = [{"prompt": "q", "responses": answers}, {"prompt": "r", "responses": answers[1:]}]
    WRITERS[".jsonl"](tmp_path / "k.jsonl", rows)
    main([str(tmp_path / "k.jsonl"), "--pair_rule", "all", "--fix", str(tmp_path / "out.jsonl")])
    assert [json.loads(x)["prompt"] for x in (tmp_path / "out.jsonl").read_text().splitlines()] == ["q"]


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        ([], "name what to check"),
        (["{bad}", "--fix", "{bad}"], "exists already, and nothing is written over"),
        (["{bad}", "--fix", "{there}/no/x.jsonl"], "there is no folder"),
        (["{bad}", "--fix", "{there}/x.csv"], "must end in .jsonl"),
        (["{bad}", "--html", "{there}/" + "x" * 300], "cannot be written: File name too long"),
        (["{bad}", "--fix", "{there}/" + "x" * 300], "cannot be written: File name too long"),
        (["{there}", "--fix", "{there}/out"], "would be read as data next time"),
        (["some/hub-id", "--fix", "{there}/x.jsonl"], "download it first"),
        (["{bad}", "--fix", "{there}/x.jsonl", "--max_rows", "3"], "cannot be used with --max_rows"),
        (["{bad}", "--pair_rule", "best"], "--pair_rule must be one of"),
        (["{bad}", "--jsn"], "--jsn is not a setting"),
        (["{bad}", "--eval_data", "{there}/bad.jsonl"], "is no folder"),
        (["{bad}", "--max_length", "100"], "--max_prompt_length must be less than --max_length"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, words: list[str], piece: str) -> None:
    bad = tmp_path / "bad.jsonl"
    WRITERS[".jsonl"](bad, ROWS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PreftreeError) as caught:
        main([word.format(bad=bad, there=tmp_path) for word in words])
    assert piece in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_hub_id_is_streamed_no_further_than_asked(
    hub: Callable[[Any], list[tuple[Any, ...]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through a stand-in for the hub's client: no network here."""
    monkeypatch.chdir(tmp_path)
    taken: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(ROWS * 50, start=1):
            taken.append(number)
            yield row

    calls = hub(rows())
    words = ["Some/pairs", "--dataset_config_name", "cfg", "--split", "test", "--max_rows", str(len(ROWS)), "--json"]
    assert main(words) == 1
    report = json.loads(capsys.readouterr().out)
    ((name, options),) = calls
    assert name == "Some/pairs"
    assert options["streaming"] is True
    assert (options["name"], options["split"]) == ("cfg", "test")
    assert report["rows"] == len(ROWS) <= len(taken) < 50 * len(ROWS)
    found = {finding["key"]: finding for finding in report["findings"]}
    assert found["contradictory_pairs"]["rows"] == ["Some/pairs:6", "Some/pairs:7"]
    with pytest.raises(SettingsError, match="download it first"):
        main(["Some/pairs", "--fix", str(tmp_path / "clean.jsonl")])
    hub(ConnectionError("no route"))
    with pytest.raises(DataError, match="ConnectionError: no route"):
        main(["Some/pairs"])


def test_it_starts_without_torch() -> None:
    code = "import sys, preftree.check.run; print(sorted({'torch', 'datasets', 'scipy', 'ftfy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_place_that_cannot_be_written_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS[".jsonl"](tmp_path / "bad.jsonl", ROWS)
    flags = {"--html": tmp_path / "x.html", "--fix": tmp_path / "x.jsonl"}
    for flag, target in flags.items():
        with monkeypatch.context() as patch:
            patch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
            with pytest.raises(SettingsError, match="may not be written"):
                main([str(tmp_path / "bad.jsonl"), flag, str(target)])
        with monkeypatch.context() as patch:  # full only when it is written
            patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(RunError, match=f"{flag} .* cannot be written: No space left on device"):
                main([str(tmp_path / "bad.jsonl"), flag, str(target)])
        assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_the_next_command_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Repair what can be repaired, else train."""
    from preftree.config.train import parse_settings

    monkey = pytest.MonkeyPatch()
    monkey.chdir(tmp_path)
    WRITERS[".jsonl"](tmp_path / "a file.jsonl", ROWS)
    main(["a file.jsonl"])
    words = shlex.split(capsys.readouterr().out.split("next ")[1])
    assert words == ["preftree", "check", "a file.jsonl", "--fix", "a file-fixed.jsonl"]
    main(words[2:])
    capsys.readouterr()
    main([words[-1]])
    words = shlex.split(capsys.readouterr().out.split("next ")[1])
    assert words[:2] == ["preftree", "train"]
    assert parse_settings(words[2:]).data.dataset_name == "a file-fixed.jsonl"
    monkey.undo()
