"""What can be seen in one row alone. To add a check: a function of a record, and a line in `ROW_CHECKS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from preftree.check.report import FixAction, Measure
from preftree.data.record import PreferencePair, PreferenceRecord
from preftree.text.damage import CONTROL, MOJIBAKE, REPLACED, SURROGATE, damage
from preftree.text.refusals import is_refusal

# Of the common chat templates; nobody writes them by hand.
CONTROL_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|begin_of_text|start_header_id|system|user|assistant|end)\|>|"
    r"\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>"
)
_CONTROL_SIGNS = ("<|", "INST]", "SYS>>", "_of_turn>", "</s>")


def trainable(pair: PreferencePair) -> bool:
    """Has the pair a prompt, two answers, and do they differ? Encoding drops all others."""
    chosen, rejected = pair.answers[:2]
    return not chosen.is_empty and not rejected.is_empty and chosen != rejected and _asks(pair)


def _asks(item: PreferencePair | PreferenceRecord) -> bool:
    return bool((item.system or "").strip()) or not all(turn.is_empty for turn in item.turns)


def texts_of(record: PreferenceRecord) -> Iterator[str]:
    """Every text of a record: system, turns, answers."""
    if record.system:
        yield record.system
    for turn in record.turns:
        yield turn.content
    for response in record.responses:
        yield response.text


def empty_prompt(record: PreferenceRecord, pairs: list[PreferencePair]) -> bool:
    return not _asks(record)


def empty_answer(record: PreferenceRecord, pairs: list[PreferencePair]) -> bool:
    return any(response.is_empty for response in record.responses)


def identical_answers(record: PreferenceRecord, pairs: list[PreferencePair]) -> bool:
    if len(record.responses) == 2:  # also where they tie, so that no pair is made of them
        return len({(response.text, response.keys) for response in record.responses}) == 1
    return any(pair.answers[0] == pair.answers[1] for pair in pairs)


def chosen_refusal(record: PreferenceRecord, pairs: list[PreferencePair]) -> bool:
    return any(is_refusal(text) for text in {pair.chosen for pair in pairs})


def control_tokens(record: PreferenceRecord, pairs: list[PreferencePair]) -> bool:
    return any(CONTROL_TOKENS.search(text) for text in texts_of(record) if any(sign in text for sign in _CONTROL_SIGNS))


def no_question(record: PreferenceRecord, pairs: list[PreferencePair]) -> bool:
    return record.turns[-1].role == "assistant"


RowCheck = Callable[[PreferenceRecord, list[PreferencePair]], bool]

ROW_CHECKS: dict[str, tuple[RowCheck, Measure]] = {
    "empty_answer": (
        empty_answer,
        Measure("empty answers", "training leaves such pairs out", spoils=0.1, fix=FixAction.DROP_WITHOUT_PAIR),
    ),
    "empty_prompt": (
        empty_prompt,
        Measure("empty prompts", "training leaves such pairs out", spoils=0.1, fix=FixAction.DROP),
    ),
    "identical_answers": (
        identical_answers,
        Measure(
            "chosen and rejected identical",
            "training leaves such pairs out",
            spoils=0.1,
            fix=FixAction.DROP_WITHOUT_PAIR,
        ),
    ),
    "chosen_refusal": (
        chosen_refusal,
        Measure(
            "chosen answers that are refusals",
            "the model learns to refuse; right for harmful prompts only, so read some of them",
            spoils=0.25,
            note=0.005,
        ),
    ),
    "control_tokens": (
        control_tokens,
        Measure(
            "chat template tokens inside texts",
            "left over from another model's template; answers end early there, or the model learns to write them",
            spoils=0.05,
        ),
    ),
    "no_question": (
        no_question,
        Measure(
            "prompts that end with the assistant's turn", "the answers are trained on as what that turn goes on with"
        ),
    ),
}
"""Name -> function of (record, its pairs), and what it means."""

DAMAGE_CHECKS: dict[str, tuple[str, Measure]] = {
    "mojibake": (
        MOJIBAKE,
        Measure(
            MOJIBAKE, "the model learns to write it; --fix undoes what is certain", spoils=0.05, fix=FixAction.REPAIR
        ),
    ),
    "characters_lost_in_decoding": (
        REPLACED,
        Measure(REPLACED, "the original characters are gone; read the source again as UTF-8", spoils=0.05),
    ),
    "control_characters": (
        CONTROL,
        Measure(CONTROL, "invisible, and tokens nobody types; --fix removes them", spoils=0.05, fix=FixAction.REPAIR),
    ),
    "lone_surrogates": (
        SURROGATE,
        Measure(SURROGATE, "tokenizers refuse them or write U+FFFD", spoils=0.0001, fix=FixAction.REPAIR),
    ),
}
"""Name -> the kind of damage as `text.damage` calls it, and what it means; one look at a text finds all of them."""


def row_hits(record: PreferenceRecord, pairs: list[PreferencePair]) -> set[str]:
    """The names of the checks in `ROW_CHECKS` and `DAMAGE_CHECKS` that are true of a row."""
    hits = {name for name, (check, _) in ROW_CHECKS.items() if check(record, pairs)}
    kinds = {kind for text in texts_of(record) for kind in damage(text)}
    return hits | {name for name, (kind, _) in DAMAGE_CHECKS.items() if kind in kinds}
