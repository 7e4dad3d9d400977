"""Prompts as the models were trained to see them."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.data.chat import Chat
from preftree.data.record import Turn
from preftree.errors import SettingsError
from preftree.prepare.templates import chat_template
from tests.support import tiny


def rendered(name: str, system: str | None, *turns: tuple[str, str]) -> str:
    tokenizer = tiny.word_tokenizer(chat_template(name))
    chat = Chat(tokenizer)
    return chat.prompt(chat.messages(system, [Turn(*turn) for turn in turns]))


def test_llama_2_as_in_metas_repository() -> None:
    asked = rendered("llama-2", "Be kind.", ("user", "Who?"))
    assert asked == "<bos>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWho? [/INST]"
    assert rendered("llama-2", None, ("user", " Who? ")) == "<bos>[INST] Who? [/INST]"
    several = rendered("llama-2", "S", ("user", "A"), ("assistant", "B"), ("user", "C"))
    assert several == "<bos>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B <eos><bos>[INST] C [/INST]"


def test_chatml() -> None:
    asked = rendered("chatml", "S", ("user", "A"))
    assert asked == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    assert chat_template(str(tmp_path / "own.jinja")) == "{{ messages[0]['content'] }}"
    with pytest.raises(SettingsError, match="Did you mean llama-2"):
        chat_template("llama2")
