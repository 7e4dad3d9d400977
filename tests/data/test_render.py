"""What is trained on under chat templates that open reasoning, drop roles, cut answers or ignore keys."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from preftree.data import render
from preftree.data.chat import Chat, refuse_broken_template
from preftree.data.encode import EncodeReport, PairEncoder
from preftree.data.files import Row
from preftree.data.formats import pair_by_prompt
from preftree.data.normalize import Normalizer
from preftree.data.record import PreferencePair
from preftree.data.scan import Table, TableScan
from preftree.data.time_limit import TemplateTimeout
from preftree.errors import ModelError
from tests.support.chats import chat_tokenizer

ASK = {"role": "user", "content": "What is 6 times 7?"}
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
HEADER = "<|im_start|>assistant\n"
QUESTION = f"<|im_start|>user\nWhat is 6 times 7?<|im_end|>\n{HEADER}"
THOUGHT = "<think>\nSix sevens.\n</think>\n\n42."


def say(content: Any, role: str = "assistant", **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def read(row: Row) -> PreferencePair:
    (scanned,) = TableScan(Table("made", "made", [(1, row)]))
    assert scanned.record is not None, scanned
    (pair,) = scanned.record.pairs()
    return pair


def pair_of(chosen: Any, rejected: Any = "No idea.", prompt: Any = (ASK,), **columns: Any) -> PreferencePair:
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {name: [side if isinstance(side, dict) else say(side)] for name, side in sides.items()}
    return read({"prompt": list(prompt), **answers, **columns})


def encoded(template: str, pair: PreferencePair) -> tuple[tuple[str, str, str], EncodeReport]:
    """Prompt, chosen and rejected as they are trained on."""
    tokenizer = chat_tokenizer(template)
    encoder = PairEncoder(tokenizer, max_length=4096, max_prompt_length=2048)
    (fate,) = encoder.encode([pair])
    assert fate.encoded is not None, fate.reason
    ids = fate.encoded.prompt_ids, fate.encoded.chosen_ids, fate.encoded.rejected_ids
    prompt, chosen, rejected = (tokenizer.decode(each) for each in ids)
    return (prompt, chosen, rejected), encoder.report


def dropped(template: str, pair: PreferencePair) -> str:
    encoder = PairEncoder(chat_tokenizer(template), max_length=4096, max_prompt_length=2048)
    (fate,) = encoder.encode([pair])
    assert fate.encoded is None
    return fate.reason


# --- reasoning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "answer", "opening", "written"),
    [
        ("cuts", THOUGHT, "", THOUGHT),
        ("R1", THOUGHT, "<think>\n", "Six sevens.\n</think>\n\n42."),
        ("R1", "Six sevens.\n</think>\n\n42.", "<think>\n", "Six sevens.\n</think>\n\n42."),
        ("R1", say("42.", reasoning_content="Six sevens."), "<think>\n", "Six sevens.\n</think>\n\n42."),
        ("Qwen3.5", THOUGHT, "<think>\n", "Six sevens.\n</think>\n\n42."),
        ("Qwen3.5", say("42.", reasoning_content="Six sevens."), "<think>\n", "Six sevens.\n</think>\n\n42."),
        ("Nemotron-3", THOUGHT, "<think>\n", "Six sevens.\n</think>\n42."),
        ("always opens", THOUGHT, "<think>\n", "Six sevens.\n</think>\n\n42."),
    ],
)
def test_a_reasoning_answer_is_trained_on_once_and_whole(
    template: str, answer: Any, opening: str, written: str
) -> None:
    other = THOUGHT.replace("42", "13")
    (prompt, chosen, rejected), report = encoded(template, pair_of(answer, other))
    assert prompt == QUESTION + opening
    assert chosen == written + "<|im_end|>"
    assert rejected.endswith("13.<|im_end|>")
    assert report.boundary_repairs == 0
    assert not [event for event in report.events if "does not write" in event]
    assert report.events[render.REASONING_INSIDE] == bool(opening)
    assert report.events[render.REASONING_KEPT] == (template == "cuts")


@pytest.mark.parametrize(
    ("template", "opening", "written"),
    [
        ("Qwen3.5", "<think>\n", "\n</think>\n\n42."),
        ("Nemotron-3", "<think>\n", "</think>42."),
        ("DeepSeek-V3.1", "</think>", "42."),
        ("cuts", "", "42."),
    ],
)
def test_a_plain_answer_closes_the_reasoning_as_the_template_does(template: str, opening: str, written: str) -> None:
    (prompt, chosen, _), _ = encoded(template, pair_of("42."))
    assert prompt == QUESTION + opening
    assert chosen == written + "<|im_end|>"


def test_the_template_is_asked_not_to_think_by_a_column() -> None:
    pair = pair_of("42.", chat_template_kwargs={"enable_thinking": False})
    (prompt, chosen, _), report = encoded("Qwen3.5", pair)
    assert prompt == QUESTION + "<think>\n\n</think>\n\n"
    assert (chosen, report.boundary_repairs) == ("42.<|im_end|>", 0)
    thinking = pair_of(THOUGHT, "<think>None.</think>13.", chat_template_kwargs='{"thinking": true}')
    (prompt, chosen, _), _ = encoded("DeepSeek-V3.1", thinking)
    assert prompt == QUESTION + "<think>"
    assert chosen == "\nSix sevens.\n</think>\n\n42.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        ("R1", "42.", render.NOT_CLOSED),
        ("always opens", "42.", render.NOT_CLOSED),
        ("R1", "<think>\nSix sevens are", render.NOT_CLOSED),
        ("DeepSeek-V3.1", THOUGHT, render.NOT_OPEN),
        ("censors", "A fox.", render.REWRITTEN),
    ],
)
def test_what_cannot_be_reconciled_is_refused_by_its_reason(template: str, answer: str, reason: str) -> None:
    assert dropped(template, pair_of(answer)) == reason


def test_pairs_that_differ_only_in_reasoning_are_pairs() -> None:
    for answers in (
        (THOUGHT, THOUGHT.replace("Six", "Some")),
        (say("42.", reasoning_content="Six sevens."), say("42.", reasoning_content="A guess.")),
    ):
        for template in ("cuts", "R1", "Qwen3.5", "reasoning key"):
            if template == "cuts" and isinstance(answers[0], dict):
                continue  # writes no reasoning from its key
            (_, chosen, rejected), _ = encoded(template, pair_of(*answers))
            assert ("Six sevens." in chosen, "Six sevens." in rejected) == (True, False)


# --- messages are carried whole --------------------------------------------------------------------


def test_an_answer_that_is_only_a_call_and_tools() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    other = {**CALL, "function": {"name": "sub", "arguments": {"a": 1, "b": [2]}}}
    calls = [say(None, tool_calls=[CALL]), say(None, tool_calls=[other])]
    (prompt, chosen, rejected), report = encoded("tools", pair_of(*calls, tools=tools))
    assert prompt.startswith('{"type": "function", "function": {"name": "add"')
    assert chosen == '<tool_call>add {"a": 1, "b": [2]}</tool_call><|im_end|>'
    assert rejected == '<tool_call>sub {"a": 1, "b": [2]}</tool_call><|im_end|>'
    assert not [event for event in report.events if "tools" in event]


@pytest.mark.parametrize("arguments", ['{"a": 1, "b": [2]}', {"a": 1, "b": [2]}])
def test_arguments_are_written_once_encoded_whatever_form_they_have(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    (_, chosen, _), _ = encoded("tools", pair_of(say("", tool_calls=[call])))
    assert chosen == '<tool_call>add {"a": 1, "b": [2]}</tool_call><|im_end|>'
    as_text = chat_tokenizer("tools").chat_template.replace("(c.function.arguments | tojson)", "c.function.arguments")
    (_, chosen, _), _ = encoded(as_text, pair_of(say("", tool_calls=[call])))
    assert chosen == '<tool_call>add {"a": 1, "b": [2]}</tool_call><|im_end|>'


def test_what_the_template_does_not_write_is_counted_and_an_answer_of_that_alone_refused() -> None:
    keys = {"tool_calls": [CALL], "name": "Ann"}
    prompt = (ASK, say("Let me see.", tool_calls=[CALL]), say("42", "tool", tool_call_id="call00000"))
    pair = pair_of(say("42.", **keys), prompt=prompt, tools=[CALL])
    _, report = encoded("ChatML", pair)
    for key in ("tool_calls", "tool_call_id", "name", "tools"):
        assert report.events[f"pairs hold `{key}`, which the chat template does not write"] == 1, key
    assert "1 pairs hold `tools`, which the chat template does not write." in report.summary()
    assert dropped("ChatML", pair_of(say(None, tool_calls=[CALL]))) == f"{render.NOT_WRITTEN} tool_calls"


def test_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "6 times 7?"}]
    (prompt, chosen, _), _ = encoded(
        "ChatML", pair_of(say([{"type": "text", "text": "42."}]), prompt=[say(parts, "user")])
    )
    assert (prompt, chosen) == (QUESTION, "42.<|im_end|>")


def test_equal_prompts_with_other_tools_are_no_pair() -> None:
    rows = [
        {"prompt": "Add.", "completion": [say("", tool_calls=[CALL])], "label": good, "tools": [{"name": name}]}
        for good, name in ((True, "add"), (False, "sub"), (False, "add"))
    ]
    scans = TableScan(Table("made", "made", list(enumerate(rows, 1))))
    paired, alone = pair_by_prompt([scanned.record for scanned in scans if scanned.record])
    assert [record.other_row for record in paired] == [2]
    assert alone == 1


# --- roles -----------------------------------------------------------------------------------------


def test_roles_of_other_names() -> None:
    row = {
        "prompt": [{"from": "system", "value": "S"}, {"from": "human", "value": "What is 6 times 7?"}],
        "chosen": {"from": "gpt", "value": "42."},
        "rejected": {"from": "gpt", "value": "13."},
    }
    (prompt, chosen, _), _ = encoded("ChatML", read(row))
    assert prompt == "<|im_start|>system\nS<|im_end|>\n" + QUESTION
    assert chosen == "42.<|im_end|>"
    assert Normalizer([row])(row)[1]


@pytest.mark.parametrize("template", ["three roles", "two roles"])
def test_a_turn_whose_role_is_not_written_costs_the_pair(template: str) -> None:
    prompt = (ASK, say("Let me see."), say("42", "tool"))
    reason = dropped(template, pair_of("42.", prompt=prompt))
    said = {"three roles": f"{render.TURN_LOST} tool", "two roles": f"{render.PROMPT_REFUSED} (unknown role tool)"}
    assert reason == said[template]
    assert dropped("three roles", pair_of("42.", prompt=[say("What?", "narrator")])).endswith("role narrator")


def test_a_role_is_not_taken_for_written_because_its_text_turns_up_elsewhere() -> None:
    prompt = (say("Say 42.", "user"), say("42", "tool"))
    assert dropped("three roles", pair_of("42.", prompt=prompt)).endswith("role tool")
    later = (ASK, say("42."), say("Be brief.", "system"), say("Again.", "user"))
    assert dropped("first system", pair_of("42.", prompt=later)).endswith("role system")


def test_developer_is_system_where_the_template_has_no_such_role() -> None:
    pair = pair_of("42.", prompt=(say("Be brief.", "developer"), ASK))
    (prompt, _, _), report = encoded("three roles", pair)
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n" + QUESTION
    assert report.events == {"prompts have turns of the role developer, which are written as system": 1}
    assert encoded("ChatML", pair)[0][0].startswith("<|im_start|>developer\n")


# --- system and continued turns --------------------------------------------------------------------


def test_an_empty_system_message_replaces_the_default_and_an_empty_column_does_not() -> None:
    (prompt, _, _), report = encoded("default system", pair_of("42.", prompt=(say("", "system"), ASK)))
    assert prompt == "<|im_start|>system\n<|im_end|>\n" + QUESTION
    assert report.events == {render.EMPTY_WRITTEN: 1}
    row = {"system": "", "question": ASK["content"], "chosen": "42.", "rejected": "13."}
    assert encoded("default system", read(row))[0][0] == "<|im_start|>system\nBe Nimbus.<|im_end|>\n" + QUESTION


def test_a_prompt_that_ends_with_the_assistants_turn_is_continued() -> None:
    prompt = (say("A haiku.", "user"), say("Soft drops on the roof,"))
    for template in ("ChatML", "cuts"):
        (rendered, chosen, _), report = encoded(template, pair_of(" a grey cat counts", prompt=prompt))
        assert rendered == f"<|im_start|>user\nA haiku.<|im_end|>\n{HEADER}Soft drops on the roof,"
        assert (chosen, report.boundary_repairs) == (" a grey cat counts<|im_end|>", 0)
        assert report.events == {render.CONTINUED: 1}
    begun = (ASK, say("<think>\nSix"))
    (rendered, chosen, _), _ = encoded("ChatML", pair_of(" sevens.</think>42.", " and.</think>13.", begun))
    assert (rendered, chosen) == (f"{QUESTION}<think>\nSix", " sevens.</think>42.<|im_end|>")
    assert dropped("ChatML", pair_of(" sevens are 42", prompt=begun)) == render.NOT_CLOSED
    assert dropped("tools", pair_of("42.", prompt=(ASK, say(None, tool_calls=[CALL])))) == render.ENDS_WITH_CALL


# --- templates that misbehave ----------------------------------------------------------------------


def test_whatever_a_template_raises_is_its_refusal() -> None:
    broken = chat_tokenizer("ChatML").chat_template + "{%- if messages[0].content == 'zero' %}{{- 1 / 0 }}{%- endif %}"
    reason = dropped(broken, pair_of("42.", prompt=[say("zero", "user")]))
    assert reason == f"{render.PROMPT_REFUSED} (ZeroDivisionError: division by zero)"
    with pytest.raises(ModelError, match="cannot render one question and its answer: ZeroDivisionError"):
        Chat(chat_tokenizer("{{ 1 / 0 }}"))


def test_a_template_that_loops_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftree.data.time_limit.SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for ask in (Chat, refuse_broken_template):
        with pytest.raises(TemplateTimeout, match="did not finish within"):
            ask(chat_tokenizer(loop))
    with pytest.raises(ModelError, match="cannot render one question: division by zero"):
        refuse_broken_template(chat_tokenizer("{{ 1 / 0 }}"))
    refuse_broken_template(chat_tokenizer("ChatML"))
    late = chat_tokenizer("ChatML").chat_template + "{%- if messages[0].content == 'loop' %}" + loop + "{%- endif %}"
    encoder = PairEncoder(chat_tokenizer(late), max_length=100, max_prompt_length=50)
    with pytest.raises(TemplateTimeout):
        encoder.encode([pair_of("42.", prompt=[say("loop", "user")])])


def test_reasoning_in_the_text_is_not_written_behind_an_empty_thought() -> None:
    (prompt, chosen, _), _ = encoded("reasoning key", pair_of(THOUGHT, THOUGHT.replace("42", "13")))
    assert (prompt, chosen) == (QUESTION, "<think>\nSix sevens.\n</think>\n\n42.<|im_end|>")


def test_pairs_that_differ_only_in_what_is_not_written_are_refused_for_that() -> None:
    sides = say("42.", reasoning_content="Six sevens."), say("42.", reasoning_content="A guess.")
    assert dropped("ChatML", pair_of(*sides)) == render.IDENTICAL_WRITTEN
    assert dropped("ChatML", pair_of("42.", "42.<|im_end|>")) == render.IDENTICAL


def test_an_empty_turn_at_the_end_opens_the_answer_and_a_call_there_cannot_be_continued() -> None:
    assert encoded("ChatML", pair_of("42.", prompt=(ASK, say(""))))[0][0] == QUESTION
    with_text = (ASK, say("Let me see.", tool_calls=[CALL]))
    assert dropped("tools", pair_of("42.", prompt=with_text)) == render.ENDS_WITH_CALL


def test_a_call_is_not_lost_where_reasoning_is_restored() -> None:
    cuts = chat_tokenizer("tools").chat_template.replace("(m.content or '')", "(m.content or '').split('</think>')[-1]")
    pair = pair_of(say(THOUGHT, tool_calls=[CALL]))
    assert dropped(cuts, pair) == render.REWRITTEN
    assert encoded("cuts", pair)[0][1] == THOUGHT + "<|im_end|>"  # which writes no calls, and says so


def test_an_answer_of_reasoning_and_keys_that_are_not_written() -> None:
    (_, chosen, _), _ = encoded("reasoning key", pair_of(say("", reasoning_content="Six sevens.", name="Ann")))
    assert chosen == "<think>\nSix sevens.\n</think>\n\n<|im_end|>"


def test_reasoning_is_not_written_twice_where_the_template_closes_it_first() -> None:
    # Reasoning in the text is no concern of this template: it closes the thought that it opened, and writes the text.
    closes = chat_tokenizer("always opens").chat_template.replace(
        "+ m.content +", "+ ('<think>\\n</think>\\n' if m.role == 'assistant' else '') + m.content +"
    )
    (prompt, chosen, _), _ = encoded(closes, pair_of(THOUGHT, THOUGHT.replace("42", "13")))
    assert (prompt, chosen) == (f"{QUESTION}<think>\n", "Six sevens.\n</think>\n\n42.<|im_end|>")


def test_reasoning_in_a_key_is_refused_where_the_generation_prompt_has_closed_it() -> None:
    kwargs = {"enable_thinking": False}
    pair = pair_of(say("42.", reasoning_content="Six sevens."), "13.", chat_template_kwargs=kwargs)
    assert dropped("Qwen3.5", pair) == render.NOT_OPEN


def test_a_call_keeps_the_end_token_that_the_template_gives_it() -> None:
    ends = chat_tokenizer("tools").chat_template.replace("'</tool_call>'", "'</tool_call><|endoftext|>'")
    ends = ends.replace("{{- '<|im_end|>\\n' }}", "{%- if not m.tool_calls %}{{- '<|im_end|>\\n' }}{%- endif %}")
    (_, chosen, rejected), report = encoded(ends, pair_of(say("", tool_calls=[CALL]), "No."))
    assert chosen == '<tool_call>add {"a": 1, "b": [2]}</tool_call><|endoftext|>'
    assert (rejected, report.early_ends) == ("No.<|im_end|>", 0)


def test_templates_of_models_that_also_see_get_contents_in_parts() -> None:
    parts = chat_tokenizer("ChatML").chat_template.replace("m.content", "m.content[0]['text']")
    (prompt, chosen, _), _ = encoded(parts, pair_of("42.", prompt=(say("Be brief.", "system"), ASK)))
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n" + QUESTION
    assert chosen == "42.<|im_end|>"
    begun = encoded(parts, pair_of(" sevens.", prompt=(ASK, say("Six"))))[0]
    assert begun[:2] == (QUESTION + "Six", " sevens.<|im_end|>")


def test_the_keys_of_a_turn_that_takes_the_system_text_stay() -> None:
    chat = Chat(chat_tokenizer("two roles"))
    pair = pair_of("42.", prompt=(say("Be brief.", "system"), {**ASK, "name": "Ann"}))
    content = "Be brief.\n\nWhat is 6 times 7?"
    assert chat.messages(pair.system, pair.turns) == [{"role": "user", "content": content, "name": "Ann"}]


def test_a_system_text_of_the_templates_own_is_told() -> None:
    (note,) = Chat(chat_tokenizer("default system")).notes
    assert note.endswith("where a conversation has none: 'Be Nimbus.'.")
    assert not Chat(chat_tokenizer("ChatML")).notes


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of writable memory")
@pytest.mark.parametrize("template", ["{{ 'x' * 10**11 }}", "{{ '%99999999999d' % 1 }}"], ids=["product", "width"])
def test_a_template_that_asks_for_all_memory(template: str) -> None:
    """Refused by its size, before the machine swaps or something else is killed."""
    with pytest.raises(ModelError, match="cannot render one question and its answer: MemoryError"):
        Chat(chat_tokenizer(template))
    with pytest.raises(ModelError, match="cannot render one question: MemoryError"):
        refuse_broken_template(chat_tokenizer(template))
