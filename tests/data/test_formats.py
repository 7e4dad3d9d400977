"""Each known format: recognised by its columns, read into prompt and answers, refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from preftree.data.fields import RowSkipped
from preftree.data.formats import (
    FORMATS,
    PART_EARLY,
    column_kinds,
    explain_unknown,
    pair_by_prompt,
    recognise,
)
from preftree.data.messages import RowProblem
from preftree.data.normalize import Normalizer
from preftree.data.record import PreferenceRecord, Turn

U, A, S = "user", "assistant", "system"


def say(role: str, content: Any, **extras: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extras}


HI, YES, NO = say(U, "Hi?"), say(A, "Yes."), say(A, "No.")
SCORES = {"score_chosen": 4.5, "score_rejected": 3.0}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "orca": ("Orca pairs", {"system": "S", "question": "Hi?", "chosen": "Yes.", "rejected": "No."}),
    "orca, no system": ("Orca pairs", {"question": "Hi?", "chosen": "Yes.", "rejected": "No."}),
    "standard": ("TRL standard", {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}),
    "conversational": ("TRL conversational", {"prompt": [HI], "chosen": [YES], "rejected": [NO]}),
    "conversational, system": (
        "TRL conversational",
        {"prompt": [say(S, "S"), HI], "chosen": [YES], "rejected": [NO]},
    ),
    "messages, answers as text": (
        "TRL conversational",
        {"prompt": [HI], "chosen": "Yes.", "rejected": "No."},
    ),
    "implicit": ("TRL implicit prompt", {"chosen": [HI, YES], "rejected": [HI, NO]}),
    "implicit, system": (
        "TRL implicit prompt",
        {"chosen": [say(S, "S"), HI, YES], "rejected": [say(S, "S"), HI, NO]},
    ),
    "hh": (
        "HH-RLHF",
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
    ),
    "ultrafeedback": ("UltraFeedback", {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", **SCORES}),
    "ultrafeedback, whole conversations": (
        "UltraFeedback",
        {"prompt": "Hi?", "chosen": [HI, YES], "rejected": [HI, NO], **SCORES},
    ),
    "service": (
        "fine-tuning service",
        {"input": {"messages": [HI], "tools": []}, "preferred_output": [YES], "non_preferred_output": [NO]},
    ),
    "ranked, UltraFeedback": (
        "ranked answers",
        {
            "instruction": "Hi?",
            "completions": [
                {"model": "a", "response": "No.", "fine-grained_score": 2.5, "overall_score": 10.0},
                {"model": "b", "response": "Yes.", "fine-grained_score": 4.75, "overall_score": 8.0},
            ],
        },
    ),
    "ranked, UltraFeedback's first version": (
        "ranked answers",
        {
            "instruction": "Hi?",
            "completions": [
                {"response": "No.", "annotations": {"honesty": {"Rating": "2"}, "helpfulness": {"Rating": "N/A"}}},
                {"response": "Yes.", "annotations": {"honesty": {"Rating": "3"}, "helpfulness": {"Rating": "4"}}},
            ],
        },
    ),
    "ranked, Nectar": (
        "ranked answers",
        {
            "prompt": "\n\nHuman: Hi?\n\nAssistant: ",
            "answers": [{"answer": "Yes.", "rank": 1.0}, {"answer": "No.", "rank": 2.0}, {"answer": "", "rank": None}],
        },
    ),
    "ranked, messages": (
        "ranked answers",
        {"prompt": [HI], "completions": [{**NO, "score": 1, "model": "a"}, {**YES, "score": 2, "model": "b"}]},
    ),
    "ranked, lists of messages": ("ranked answers", {"prompt": "Hi?", "responses": [[NO], [YES]], "scores": [1, 2]}),
    "ranked, scores beside": ("ranked answers", {"prompt": [HI], "responses": ["No.", "Yes."], "scores": [0.5, 3]}),
    "ranked, ranks beside": (
        "ranked answers",
        {"question": "Hi?", "responses": ["No.", "Yes.", "?"], "ranks": [2, 1, None]},
    ),
    "extras of OpenAI": (
        "TRL conversational",
        {
            "prompt": [say(U, "Hi?", name=None)],
            "chosen": [say(A, "Yes.", refusal=None, tool_calls=None)],
            "rejected": [NO],
        },
    ),
    "sharegpt": (
        "ShareGPT pairs",
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ),
    "alpaca": ("alpaca pairs", {"instruction": "Hi?", "input": "", "history": [], "chosen": "Yes.", "rejected": "No."}),
}


def plain(row: dict[str, Any]) -> Any:
    return Normalizer([row])(row)[0]


def read(row: dict[str, Any]) -> PreferenceRecord:
    name = recognise(column_kinds([plain(row)]))
    assert name is not None
    return FORMATS[name].read(plain(row))


@pytest.mark.parametrize("case", ROWS)
def test_format_is_recognised_and_read(case: str) -> None:
    name, row = ROWS[case]
    assert recognise(column_kinds([plain(row)])) == name
    (pair,) = read(row).pairs()
    assert (pair.turns, pair.chosen, pair.rejected) == ((Turn(U, "Hi?"),), "Yes.", "No.")
    assert pair.system == ("S" if case == "orca" or case.endswith(", system") else None)


def test_every_format_has_a_row_here() -> None:
    assert {name for name, _ in ROWS.values()} | {"KTO labels"} == set(FORMATS)


def test_hh_dialogue_of_several_turns() -> None:
    start = "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three lines:\n\nthird"
    row = {"chosen": f"{start}\n\nAssistant: Good", "rejected": f"{start}\n\nAssistant: Bad\n\nagain"}
    (pair,) = read(row).pairs()
    assert pair.turns == (Turn(U, "One"), Turn(A, "Two"), Turn(U, "Three lines:\n\nthird"))
    assert (pair.chosen, pair.rejected) == ("Good", "Bad\n\nagain")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [HI, NO, HI, YES], "rejected": [HI, YES, HI, NO]},
        {"chosen": [HI, YES], "rejected": [HI, NO, HI, NO]},
        {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: C\n\nAssistant: D"},
    ],
    ids=["earlier answer", "longer", "hh"],
)
def test_conversations_that_part_early_are_skipped(row: dict[str, Any]) -> None:
    with pytest.raises(RowSkipped, match=PART_EARLY):
        read(row)


@pytest.mark.parametrize(("better", "worse", "pairs"), [(2.0, 1.0, 1), (1.0, 1.0, 0), (1.0, 2.0, 0)])
def test_equal_or_contradicting_scores_prefer_nothing(better: float, worse: float, pairs: int) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": better, "score_rejected": worse}
    record = read(row)
    assert [response.score for response in record.responses] == [better, worse]
    assert len(record.pairs()) == pairs


def labelled(prompt: str, completion: str, label: Any) -> PreferenceRecord:
    return read({"prompt": prompt, "completion": completion, "label": label})


def test_kto_labels_pair_by_prompt_in_order() -> None:
    rows = [
        ("p", "bad 1", False),
        ("q", "good", True),
        ("p", "good 1", "True"),
        ("p", "good 2", 1),
        ("p", "bad 2", 0),
    ]
    records = [
        PreferenceRecord(r.system, r.turns, r.responses, source=f"k:{place + 1}", row=place)
        for place, r in enumerate(labelled(*row) for row in rows)
    ]
    paired, alone = pair_by_prompt(records)
    pairs = [pair for record in paired for pair in record.pairs()]
    assert [(p.turns[0].content, p.chosen, p.rejected, p.source) for p in pairs] == [
        ("p", "good 1", "bad 1", "k:1"),
        ("p", "good 2", "bad 2", "k:4"),
    ]
    assert alone == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": 5}, "column `chosen` must be text or a list of messages. Got int (5) instead"),
        (
            {"rejected": None},
            "column `rejected` must be text or a list of messages. Got nothing (null) instead",
        ),
        ({"prompt": 1.5}, "column `prompt` must be text"),
        ({"system": ["x"]}, "column `system` must be text. Got list instead"),
        ({"chosen": []}, "Got an empty list instead"),
        (
            {"chosen": [say(A, None)]},
            "column `chosen`, message 1: `content` must be text. Got nothing (null)",
        ),
        ({"chosen": [say(A, [{"type": "text"}])]}, "message 1: its content has a part of the type text, and only text"),
        ({"prompt": [say(U, [{"type": "image", "url": "x"}])]}, "a part of the type image, and only text"),
        ({"chosen": [{"role": A, "contents": "x"}]}, "Did you mean contents?"),
        ({"chosen": [{"content": "x", "from": A}]}, "message 1: `role` must be text"),
        ({"chosen": [YES, YES]}, "must hold one assistant message. Got messages of assistant, assistant"),
        ({"prompt": [say(S, "only")]}, "holds a system message and nothing to answer"),
        ({"system": "T", "prompt": [say(S, "S"), HI]}, "differ; keep one"),
        ({"score_chosen": "high"}, "column `score_chosen` must be a number. Got str"),
        ({"score_chosen": float("nan")}, "column `score_chosen` must be a number"),
        ({"chosen": [say(U, "Else?"), YES], "rejected": [say(U, "Else?"), NO]}, "is not the prompt that"),
    ],
)
def test_broken_values_are_named(change: dict[str, Any], said: str) -> None:
    row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", **SCORES} | change
    with pytest.raises(RowProblem) as caught:
        FORMATS["UltraFeedback"].read(row)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("KTO labels", {"prompt": "p", "completion": "c", "label": "maybe"}, "`label` must be true or false"),
        ("HH-RLHF", {"chosen": "no turns", "rejected": "x"}, 'must begin with "Human:"'),
        (
            "HH-RLHF",
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
            "ends with the assistant's answer",
        ),
        (
            "fine-tuning service",
            {
                "input": {"messages": [HI], "tools": "search"},
                "preferred_output": [YES],
                "non_preferred_output": [NO],
            },
            "column `input.tools` is text and not JSON",
        ),
        (
            "Orca pairs",
            {"question": "q", "chosen": "a", "rejectd": "b"},
            "no column `rejected`. Did you mean rejectd?",
        ),
    ],
)
def test_other_broken_rows(name: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem) as caught:
        FORMATS[name].read(row)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (("system", "question", "chosen", "rejectd"), "Did you mean rejected?"),
        (("promt", "chosen", "rejected"), "Did you mean prompt?"),
        (("question", "response"), "preference training also needs `rejected` answers"),
        (("chosen", "rejected"), "lacks `question`"),
    ],
)
def test_unknown_columns_are_explained(columns: tuple[str, ...], said: str) -> None:
    assert recognise(dict.fromkeys(columns, "text")) is None
    assert said in explain_unknown(columns)


def test_unused_columns_are_kept_as_extra() -> None:
    assert read({"question": "q", "chosen": "a", "rejected": "b", "check": "len<5"}).extra == {"check": "len<5"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"responses": ["a", "b"]}, "answer 1: it has neither a rank nor a score"),
        ({"responses": ["a", "b"], "scores": [1]}, "`scores` must hold 2 values, one for each answer. Got 1"),
        ({"responses": ["a", "b"], "scores": 3}, "`scores` must hold 2 values, one for each answer. Got int (3)"),
        ({"responses": ["a", 5], "scores": [1, 2]}, "column `responses`, answer 2 must be text. Got int (5)"),
        ({"responses": ["a", "b"], "scores": [1, "x"]}, "column `scores`, value 2 must be a number. Got str"),
        ({"responses": ["a", "b"], "scores": [1, 10**400]}, "column `scores`, value 2 must be a number"),
        ({"responses": ["a", "b"], "ranks": [1, 1.5]}, "a rank must be a whole number"),
        ({"responses": "a", "scores": [1]}, "must be a list of answers. Got str"),
        ({"responses": [{"say": "x", "rank": 1}]}, "must have its text under one of response, text"),
        ({"responses": [{"text": None, "rank": 1}]}, "Got nothing (null)"),
    ],
)
def test_broken_ranked_rows(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem) as caught:
        FORMATS["ranked answers"].read({"prompt": "Hi?", **row})
    assert said in str(caught.value)


@pytest.mark.parametrize("scores", [[1, None], ["N/A", None]])
def test_too_few_ranked_answers(scores: list[Any]) -> None:
    with pytest.raises(RowSkipped, match="fewer than two answers"):
        FORMATS["ranked answers"].read({"prompt": "Hi?", "responses": ["a", "b"], "scores": scores})


def test_answers_of_several_messages_share_their_steps_with_the_prompt() -> None:
    call = say(A, None, tool_calls=[{"function": {"name": "f"}}])
    steps = [call, say("tool", "5")]
    row = {"prompt": [say(S, "S"), HI], "chosen": [*steps, YES], "rejected": [*steps, NO]}
    (pair,) = read(row).pairs()
    assert [turn.role for turn in pair.turns] == [U, A, "tool"]
    assert (pair.system, pair.chosen, pair.rejected) == ("S", "Yes.", "No.")
    with pytest.raises(RowSkipped, match=PART_EARLY):
        read(row | {"rejected": "No."})


def test_ranked_answers_carry_their_calls() -> None:
    call, other = ({"function": {"name": name}} for name in ("f", "g"))
    rows = [say(A, None, tool_calls=[call], score=1), say(A, None, tool_calls=[other], score=2)]
    (pair,) = read({"prompt": [HI], "completions": rows}).pairs()
    assert pair.chosen_keys == '{"content": null, "tool_calls": [{"function": {"name": "g"}}]}'
