"""Rows as data sets have them: messages as text, dialogues, `input` beside instructions, answers with their prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftree.data import normalize
from preftree.data.record import PreferencePair, Turn
from preftree.data.scan import Table, TableScan
from preftree.data.sources import load_pairs

USER = {"role": "user", "content": "Name a red fruit."}
GOOD, BAD = {"role": "assistant", "content": "A cherry."}, {"role": "assistant", "content": "Slate."}
ASKED = (Turn("user", "Name a red fruit."),)
HH = "\n\nHuman: Name a fruit.\n\nAssistant: Which colour?\n\nHuman: Name a red fruit.\n\nAssistant:"


def pairs_of(*rows: dict[str, Any]) -> list[tuple[PreferencePair, tuple[str, ...]]]:
    """The pairs of a table with these rows, each with the notes on its row."""
    found = []
    for scanned in TableScan(Table("made", "made", list(enumerate(rows, 1)))):
        assert scanned.record is not None, scanned
        found += [(pair, scanned.record.notes) for pair in scanned.record.pairs()]
    return found


def read(row: dict[str, Any]) -> tuple[tuple[Turn, ...], str, str, tuple[str, ...]]:
    ((pair, notes),) = pairs_of(row)
    return pair.turns, pair.chosen, pair.rejected, notes


def problem(*rows: dict[str, Any]) -> str:
    said = [scanned.problem for scanned in TableScan(Table("made", "made", list(enumerate(rows, 1))))]
    return next(each for each in said if each)


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["json", "repr"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Name a red fruit.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"prompt": [USER], "responses": ["Slate.", "A cherry."], "scores": [1, 2]},
        {
            "instruction": "Name a red fruit.",
            "completions": [{"response": "A cherry.", "score": 2}, {"response": "Slate.", "score": 1}],
        },
    ],
    ids=lambda row: ",".join(row),
)
def test_messages_and_lists_stored_as_text(row: dict[str, Any], write: Any) -> None:
    as_text = {name: value if isinstance(value, str) else write(value) for name, value in row.items()}
    assert read(as_text) == (ASKED, "A cherry.", "Slate.", (normalize.PARSED,))


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(json.dumps([USER, GOOD])),
        json.dumps([{"id": 7, **USER}, {"id": 8, **GOOD}]),
        f"array({[USER, GOOD]!r}, dtype=object)",
    ],
    ids=["JSON in JSON", "another key first", "numpy's repr"],
)
def test_messages_as_text_of_other_makes(written: str) -> None:
    row = {"prompt": "Name a red fruit.", "chosen": written, "rejected": written.replace("A cherry.", "Slate.")}
    turns, *rest = read(row)
    assert [turn.content for turn in turns] == ["Name a red fruit."]
    assert rest == ["A cherry.", "Slate.", (normalize.PARSED,)]


def test_arrays_printed_without_commas_are_refused_by_what_they_are() -> None:
    text = "[{'content': 'Name a red fruit.', 'role': 'user'}\n {'content': 'A cherry.', 'role': 'assistant'}]"
    table = TableScan(Table("made", "made", [(1, {"chosen": text, "rejected": text.replace("cherry", "stone")})]))
    assert ["holds messages as text" in each for each in table.problems] == [True]


def test_calls_as_text_bare_calls_and_empty_lists_of_calls() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    asked = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    expected = read({"prompt": [USER], "chosen": [asked], "rejected": [BAD]})
    named = {"id": "call00000", **asked["tool_calls"][0]}
    numbered = read({"prompt": [USER], "chosen": [{**asked, "tool_calls": [named]}], "rejected": [BAD]})
    bare = {**asked, "tool_calls": [{"id": "call00000", **call}]}
    assert read({"prompt": [USER], "chosen": [bare], "rejected": [BAD]}) == numbered
    for calls in ([call], json.dumps([call]), json.dumps(asked["tool_calls"])):
        assert read({"prompt": [USER], "chosen": [{**asked, "tool_calls": calls}], "rejected": [BAD]}) == expected
    empty = read({"prompt": [{**USER, "tool_calls": []}], "chosen": [{**GOOD, "tool_calls": []}], "rejected": [BAD]})
    assert empty == (ASKED, "A cherry.", "Slate.", ())


def test_messages_as_text_that_cannot_be_read_are_refused_and_a_single_such_answer_is_an_answer() -> None:
    numpy = "[{'role': 'user', 'content': 'x'}\n {'role': 'assistant', 'content': 'y'}]"
    assert "column `chosen` holds messages as text" in problem({"prompt": "p", "chosen": numpy, "rejected": "r"})
    asked = {"prompt": "Show me a chat as JSON.", "chosen": json.dumps([USER, GOOD]), "rejected": "No."}
    plain = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(2)]
    (pair, notes) = pairs_of(asked, *plain)[0]
    assert (pair.chosen, notes) == (asked["chosen"], ())


@pytest.mark.parametrize("column", ["prompt", "question", "instruction"])
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [(" A cherry.", " Slate."), (f"{HH} A cherry.", f"{HH} Slate."), ("\n\nAssistant: A cherry.", "Assistant: Slate.")],
    ids=["answers", "whole dialogues", "headings"],
)
def test_a_dialogue_in_a_prompt(column: str, chosen: str, rejected: str) -> None:
    turns = (Turn("user", "Name a fruit."), Turn("assistant", "Which colour?"), *ASKED)
    assert read({column: HH, "chosen": chosen, "rejected": rejected}) == (
        turns,
        "A cherry.",
        "Slate.",
        (normalize.SPLIT,),
    )


@pytest.mark.parametrize("repeated", [False, True])
def test_instructions_before_a_dialogue_are_the_system_message(repeated: bool) -> None:
    text = f"System: Be brief.{HH}"
    before = text if repeated else ""
    ((pair, notes),) = pairs_of({"prompt": text, "chosen": f"{before} A cherry.", "rejected": f"{before} Slate."})
    assert (pair.system, len(pair.turns), pair.chosen, pair.rejected) == ("Be brief.", 3, "A cherry.", "Slate.")
    assert notes == (normalize.SPLIT,)


def test_dialogues_with_single_line_breaks_and_texts_that_are_none() -> None:
    ((pair, _),) = pairs_of(*[{"prompt": HH, "completion": " A cherry.", "label": good} for good in ()]) or [
        (None, None)
    ]
    assert pair is None
    lines = "Human: Hi\nAssistant: Ho\nHuman: Name a red fruit.\nAssistant:"
    assert read({"prompt": lines, "chosen": "A cherry.", "rejected": "Slate."})[0][-1] == ASKED[0]
    for text in ("Human: the movie", "Assistant: is a word", "He said Human: no"):  # texts of people
        assert read({"prompt": text, "chosen": "a", "rejected": "b"})[0] == (Turn("user", text),)
    other = f"{HH} A cherry.".replace("red", "blue")
    assert "does not go on from" in problem({"prompt": HH, "chosen": other, "rejected": other})


def test_answers_that_repeat_their_prompt_are_cut() -> None:
    row = {
        "prompt": "Name a red fruit.",
        "chosen": "Name a red fruit. A cherry.",
        "rejected": "Name a red fruit.\n\nSlate.",
    }
    assert read(row) == (ASKED, "A cherry.", "Slate.", (normalize.CUT,))
    messages = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    assert read({"prompt": [USER], **messages})[1:3] == ("A cherry.", "Slate.")
    ranked = {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "scores": [2, 1]}
    assert read(ranked)[1:] == ("A cherry.", "Slate.", (normalize.CUT,))


@pytest.mark.parametrize(
    ("row", "written"),
    [
        # Only one of the two answers repeats it.
        ({"prompt": "Name a red fruit.", "chosen": "Name a red fruit. A cherry.", "rejected": "Slate."}, "A cherry."),
        # The system text is repeated as well.
        (
            {
                "system": "Be brief.",
                "question": "Name a red fruit.",
                "chosen": "Be brief.\n\nName a red fruit.\n\nA cherry.",
                "rejected": "Be brief.\n\nName a red fruit.\n\nSlate.",
            },
            "A cherry.",
        ),
        # The answer goes on within the line, with and without white space.
        ({"prompt": "Complete this: def f(", "chosen": "Complete this: def f(x)", "rejected": "Slate."}, "x)"),
        (
            {
                "prompt": [USER, {"role": "assistant", "content": "A"}],
                "chosen": [{"role": "assistant", "content": "A cherry."}],
                "rejected": [{"role": "assistant", "content": "A slate."}],
            },
            " cherry.",
        ),
    ],
)
def test_every_column_is_looked_at_for_repeated_prompts(row: dict[str, Any], written: str) -> None:
    _, chosen, rejected, notes = read(row)
    assert (chosen, normalize.CUT in notes) == (written, True)
    assert rejected.strip() in ("Slate.", "slate.")


def test_an_answer_that_begins_like_its_prompt_by_chance_is_left() -> None:
    assert read({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"})[1:] == ("Hi there", "Hi you", ())
    repeats = {"prompt": "Say it again Sam", "chosen": "Say it again Sam I did", "rejected": "Say it again Sam no"}
    others = [{"prompt": f"What comes after {i}?", "chosen": str(i + 1), "rejected": "?"} for i in range(3)]
    assert pairs_of(*others, repeats)[-1][0].chosen == repeats["chosen"]
    prefix = {"prompt": "Name a red fruit", "chosen": "Name a red fruitcake", "rejected": "Name a red fruits"}
    assert read(prefix)[1] == "Name a red fruitcake"


@pytest.mark.parametrize("column", ["question", "instruction", "prompt"])
def test_input_is_part_of_the_prompt(column: str) -> None:
    row = {column: "Translate.", "input": "Die Kirsche", "chosen": "The cherry", "rejected": "The slate"}
    turns, *_, notes = read(row)
    assert (turns, notes) == ((Turn("user", "Translate.\n\nDie Kirsche"),), (normalize.JOINED,))
    assert read(row | {"input": ""})[0] == (Turn("user", "Translate."),)
    assert read(row | {column: "Translate: Die Kirsche"})[0] == (Turn("user", "Translate: Die Kirsche"),)
    assert "column `input` beside" in problem(row | {"input": 5})


def test_history_of_the_alpaca_form() -> None:
    row = {"instruction": "Name a red fruit.", "history": [["Hi", "Ho"]], "chosen": "A cherry.", "rejected": "Slate."}
    assert read(row)[0] == (Turn("user", "Hi"), Turn("assistant", "Ho"), *ASKED)
    assert read(row | {"history": "[['Hi', 'Ho']]"})[0][0] == Turn("user", "Hi")
    assert "must be a list of pairs of texts" in problem(row | {"history": [["Hi"]]})


def test_the_system_message_of_a_prompt_beside_whole_conversations_is_kept() -> None:
    system = {"role": "system", "content": "S"}
    ((pair, _),) = pairs_of({"prompt": [system, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert (pair.system, pair.turns) == ("S", ASKED)


def test_notes_are_counted_over_the_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl"
    rows = [{"prompt": HH, "chosen": f"a{i}", "rejected": "b"} for i in range(3)] + [
        {"prompt": "p", "chosen": "a", "rejected": "b"}
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_pairs(str(path))
    assert loaded.notes == {normalize.SPLIT: 3}
    assert f"In 3 rows {normalize.SPLIT}." in loaded.summary()


def test_a_row_that_is_nested_too_deeply_is_named() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    sound = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert problem(sound, {**sound, "prompt": [{**USER, "note": deep}]}) == "made row 2: it is nested too deeply."


def test_a_dialogue_in_the_only_message_of_a_prompt() -> None:
    system = {"role": "system", "content": "S"}
    answers = {name: [{"role": "assistant", "content": f"\n\nAssistant: {name}"}] for name in ("chosen", "rejected")}
    ((pair, notes),) = pairs_of({"prompt": [system, {"role": "user", "content": HH}], **answers})
    assert (pair.system, len(pair.turns), pair.chosen, notes) == ("S", 3, "chosen", (normalize.SPLIT,))
    ranked = {"prompt": HH, "answers": [{"answer": f"{HH} A cherry.", "rank": 1}, {"answer": " Slate.", "rank": 2}]}
    assert read(ranked)[1:3] == ("A cherry.", "Slate.")


def test_answers_that_are_whole_dialogues_beside_a_plain_prompt() -> None:
    row = {"prompt": "Name a red fruit.", "chosen": f"{HH} A cherry.", "rejected": f"{HH} Slate."}
    turns = (Turn("user", "Name a fruit."), Turn("assistant", "Which colour?"), *ASKED)
    assert read(row) == (turns, "A cherry.", "Slate.", (normalize.SPLIT,))
    play = {"prompt": "Write a dialogue.", "chosen": f"{HH} A cherry.", "rejected": f"{HH} Slate."}
    assert read(play)[1:] == (play["chosen"], play["rejected"], ())


def test_input_beside_an_instruction_and_the_prompt_made_of_both() -> None:
    made = {"instruction": "Translate.", "input": "Die Kirsche", "prompt": "Translate this: cherry"}
    assert read({**made, "chosen": "a", "rejected": "b"})[0] == (Turn("user", "Translate this: cherry"),)
