"""Every chat template that TRL brings along, with pairs of every kind: what is trained on is what inference sees."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from preftree.data import render
from preftree.data.encode import PairEncoder, PairFate
from preftree.data.reasoning import count_marks, left_open
from preftree.data.record import PreferencePair
from preftree.errors import ModelError
from tests.data.test_render import ASK, CALL, THOUGHT, pair_of, say
from tests.support.chats import chat_tokenizer

_SPEC = find_spec("trl")
_FOLDER = Path(str(_SPEC.origin)).parent / "chat_templates" if _SPEC is not None else Path("none")
TEMPLATES = sorted(_FOLDER.glob("*.jinja"))
_MARKS = re.compile(r"<\|\w+\|?>|</?[a-z_]+>|<\uff5c[^\uff5c]+\uff5c>|\[/?[A-Z_]+\]|<\w+\|>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "one"}}},
        },
    }
]
OTHER = {**CALL, "function": {"name": "add", "arguments": {"a": 7, "b": []}}}
PAIRS = {
    "plain": pair_of("42.", "13."),
    "system": pair_of("42.", "13.", prompt=(say("Be brief.", "system"), ASK)),
    "turns": pair_of("42.", "13.", prompt=(ASK, say(THOUGHT), say("Sure?", "user"))),
    "reasoning": pair_of(THOUGHT, THOUGHT.replace("42", "13")),
    "reasoning key": pair_of(say("42.", reasoning_content="Six sevens."), say("13.", reasoning_content="A guess.")),
    "calls": pair_of(say("", tool_calls=[CALL]), say("", tool_calls=[OTHER]), tools=TOOLS),
    "tool": pair_of(
        "42.", "13.", prompt=(ASK, say("", tool_calls=[CALL]), say("43", "tool", tool_call_id="call00000"))
    ),
    "begun": pair_of(" sevens.", " eights.", prompt=(ASK, say("Six"))),
    "not thinking": pair_of("42.", "13.", chat_template_kwargs={"enable_thinking": False}),
}
REASONS = (
    render.PROMPT_REFUSED,
    render.TURN_LOST,
    render.NOT_CLOSED,
    render.NOT_OPEN,
    render.NOT_WRITTEN,
    render.REWRITTEN,
)


def encoder_of(path: Path) -> Any:
    template = path.read_text(encoding="utf-8")
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    marks = sorted(set(_MARKS.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": [mark for mark in marks if not count_marks(mark)]})
    return PairEncoder(tokenizer, max_length=9000, max_prompt_length=8000)


def check(name: str, pair: PreferencePair, fate: PairFate, encoder: PairEncoder) -> None:
    if fate.encoded is None:
        assert fate.reason.startswith(REASONS), fate.reason
        assert name not in ("system", "begun", "not thinking") or fate.reason == render.NOT_CLOSED
        return
    tokenizer = encoder.chat.tokenizer
    prompt, chosen, rejected = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (fate.encoded.prompt_ids, fate.encoded.chosen_ids, fate.encoded.rejected_ids)
    )
    extras = {"enable_thinking": False} if name == "not thinking" else {}
    extras |= {"tools": TOOLS} if name == "calls" else {}
    messages = encoder.chat.messages(pair.system, pair.turns)
    seen = encoder.chat.continued(messages) if name == "begun" else encoder.chat.prompt(messages, extras=extras)
    assert prompt == seen
    assert fate.repairs == 0
    for text, answer in ((chosen, pair.answers[0]), (rejected, pair.answers[1])):
        assert "".join(answer.content.split()) in "".join((prompt + text).split())
        assert left_open(prompt + text) is None or name == "turns"
        assert count_marks(text) <= 2
        assert "None" not in text
    if name == "calls":
        assert "add" in chosen
        assert "7" in rejected


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed, or brings no templates")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_trained_on_is_what_inference_sees(path: Path) -> None:
    try:
        encoder = encoder_of(path)
    except ModelError as error:
        pytest.fail(str(error))
    for name, fate in zip(PAIRS, encoder.encode(list(PAIRS.values())), strict=True):
        check(name, PAIRS[name], fate, encoder)
