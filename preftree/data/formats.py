"""How a row of a known preference format becomes a record.

To add a format, write one function `read(row) -> PreferenceRecord` from the parts in `fields.py`, and one line in
`FORMATS`. A reader raises `RowProblem` for a row that is broken (the user is told, nothing is loaded) and
`RowSkipped` for a sound row that states no usable preference (it is left out and counted).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from preftree.data.dialogue import dialogue_turns
from preftree.data.fields import (
    RowSkipped,
    extra_of,
    kind_of,
    label,
    number,
    prompt_of,
    split_system,
    system_of,
    text_of,
    value_of,
)
from preftree.data.files import Row
from preftree.data.messages import RowProblem, answer_of, json_column, turns_of
from preftree.data.normalize import RANKED
from preftree.data.ranked import PROMPTS, read_ranked
from preftree.data.record import PreferenceRecord, Response, Turn
from preftree.errors import did_you_mean

Columns = Mapping[str, str]
"""Column name -> kind of its values, one of the words of `kind_of`."""

PART_EARLY = "the two conversations part before the last answer"
NO_PREFERENCE = "no preference (scores equal, or against the column names)"
NO_MARGIN = "no two answers whose scores differ by more than min_margin"
NO_SCORES = "no scores, which min_margin needs"
NO_OPPOSITE = "no answer with the opposite label to the same prompt"


@dataclass(frozen=True, slots=True)
class Format:
    """One known layout of rows.

    `needs` are the columns that it cannot do without (for messages), `recognise` decides from the columns and
    their kinds, `read` turns one row into a record. With `by_prompt`, rows hold one labelled answer each
    (rank 1 good, rank 2 bad) and are paired afterwards by equal prompts.
    """

    needs: tuple[str, ...]
    recognise: Callable[[Columns], bool]
    read: Callable[[Row], PreferenceRecord]
    by_prompt: bool = False


def column_kinds(rows: Sequence[Row]) -> dict[str, str]:
    """Each column that at least half of `rows` have, with the commonest kind among its values."""
    seen: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items():
            seen.setdefault(str(name), Counter())[kind_of(value)] += 1
    return {name: kinds.most_common(1)[0][0] for name, kinds in seen.items() if 2 * kinds.total() >= len(rows)}


def recognise(columns: Columns) -> str | None:
    """The name of the first format in `FORMATS` that fits, or None."""
    return next((name for name, known in FORMATS.items() if known.recognise(columns)), None)


def explain_unknown(columns: Iterable[str]) -> str:
    """Why rows with these columns fit no format, what is missing for the nearest one, and what to do."""
    names = list(columns)
    lacking = {name: [n for n in fmt.needs if n not in names] for name, fmt in FORMATS.items()}
    near = max((name for name in lacking if lacking[name]), key=lambda name: _fit(FORMATS[name].needs, names))
    missing = lacking[near]
    said = f"its columns ({', '.join(names)}) are those of no known preference format."
    said += f" For the nearest, {near}, it lacks {' and '.join(f'`{name}`' for name in missing)}."
    known = {need for fmt in FORMATS.values() for need in fmt.needs}
    for name in names:
        if name not in known and (hint := did_you_mean(name, missing)):
            said += f" `{name}` is not a known column.{hint}"
    if "response" in names and "rejected" not in names:
        said += " `response` is one answer to each question; preference training also needs `rejected` answers."
        said += " `preftree prepare` writes them."
    layouts = "; ".join(f"{name} ({', '.join(fmt.needs)})" for name, fmt in FORMATS.items())
    return f"{said} Rename or add columns so that one of these fits: {layouts}."


def pair_by_prompt(records: Iterable[PreferenceRecord]) -> tuple[list[PreferenceRecord], int]:
    """Records of one labelled answer each -> records of a good and a bad answer to the same prompt.

    The first good answer to a prompt goes with the first bad one, the second with the second, and so on. A
    new record stands at the earlier of its two rows. Also returns how many answers found no opposite.
    """
    groups: dict[Hashable, tuple[list[PreferenceRecord], list[PreferenceRecord]]] = {}
    for record in records:
        same = (record.system, record.turns, record.tools, record.template_kwargs)
        sides = groups.setdefault(same, ([], []))
        sides[0 if record.responses[0].rank == 1 else 1].append(record)
    paired: list[PreferenceRecord] = []
    alone = 0
    for good, bad in groups.values():
        alone += abs(len(good) - len(bad))
        for first, second in zip(good, bad, strict=False):
            place, later = sorted((first, second), key=lambda record: record.row)
            answers = first.responses + second.responses
            paired.append(replace(place, responses=answers, other_row=later.row))
    return sorted(paired, key=lambda record: record.row), alone


# --- the readers ----------------------------------------------------------------------------------


def read_prompted(row: Row, prompt_column: str = "prompt") -> PreferenceRecord:
    """prompt, chosen and rejected, each a text or a list of messages; an optional `system` text."""
    chosen, rejected = value_of(row, "chosen"), value_of(row, "rejected")
    system, turns = prompt_of(row, prompt_column)
    if "conversation" in (kind_of(chosen), kind_of(rejected)):
        return _whole_conversations(row, system, (prompt_column, turns[-1].content))
    if any(map(_has_steps, (chosen, rejected))):
        return _answers_in_steps(row, system, turns)
    used = (prompt_column, "chosen", "rejected", "system", "system_prompt")
    answers = answer_of(chosen, "chosen"), answer_of(rejected, "rejected")
    return _record(row, system_of(row, system), turns, answers, used)


def read_orca(row: Row) -> PreferenceRecord:
    """Intel/orca_dpo_pairs: system (may be absent), question, chosen, rejected."""
    return read_prompted(row, "question")


def read_alpaca(row: Row) -> PreferenceRecord:
    """The alpaca form: instruction, chosen, rejected; `input` and `history` have joined the instruction."""
    return read_prompted(row, "instruction")


def read_sharegpt(row: Row) -> PreferenceRecord:
    """ShareGPT's conversations, with the two answers beside them."""
    return read_prompted(row, "conversations")


def read_ultrafeedback(row: Row) -> PreferenceRecord:
    """UltraFeedback, binarized: as `read_prompted`, with score_chosen and score_rejected.

    Where the scores are equal or say the opposite of the columns, both answers get rank 1: whoever made the
    pair picked a side by chance, or by another measure that the row does not tell.
    """
    record = read_prompted(row)
    scores = _score(row, "score_chosen"), _score(row, "score_rejected")
    ranks = (1, 2) if scores[0] > scores[1] else (1, 1)
    answers = tuple(
        replace(response, score=score, rank=rank)
        for response, score, rank in zip(record.responses, scores, ranks, strict=True)
    )
    return replace(record, responses=answers)


def read_implicit(row: Row) -> PreferenceRecord:
    """TRL's implicit prompt: chosen and rejected are whole conversations that share their beginning."""
    return _whole_conversations(row, None, None)


def read_hh(row: Row) -> PreferenceRecord:
    """HH-RLHF: chosen and rejected are texts of "\\n\\nHuman: …\\n\\nAssistant: …" turns."""
    chosen, rejected = (dialogue_turns(text_of(row, column), column) for column in ("chosen", "rejected"))
    return _from_conversations(row, chosen, rejected)


def read_kto(row: Row) -> PreferenceRecord:
    """KTO: prompt, one completion, and a label that says whether it is a good one."""
    system, turns = prompt_of(row, "prompt")
    said = answer_of(value_of(row, "completion"), "completion")
    answer = Response(said.content, rank=1 if label(row) else 2, keys=said.keys)
    extra = extra_of(row, ("prompt", "completion", "label", "system", "system_prompt"))
    return PreferenceRecord(system_of(row, system), turns, (answer,), extra=extra)


def read_services(row: Row) -> PreferenceRecord:
    """The fine-tuning services' input (with its messages), preferred_output, non_preferred_output."""
    given = value_of(row, "input")
    tools = ""
    if isinstance(given, Mapping):
        tools = json_column(given.get("tools"), "input.tools", list)
        given = given.get("messages")
    system, turns = split_system(turns_of(given, "input"), "input")
    columns = ("preferred_output", "non_preferred_output")
    answers = tuple(answer_of(value_of(row, column), column) for column in columns)
    return replace(_record(row, system, turns, answers, ("input", *columns)), tools=tools)


# --- parts of readers -----------------------------------------------------------------------------


def _score(row: Row, column: str) -> float:
    return number(value_of(row, column), f"column `{column}`")


def _record(
    row: Row, system: str | None, turns: tuple[Turn, ...], answers: Sequence[Turn], used: Iterable[str]
) -> PreferenceRecord:
    responses = tuple(Response(turn.content, rank=rank, keys=turn.keys) for rank, turn in enumerate(answers, start=1))
    return PreferenceRecord(system, turns, responses, extra=extra_of(row, used))


def _whole_conversations(row: Row, system: str | None, prompt: tuple[str, str] | None) -> PreferenceRecord:
    """Both answers are whole conversations; a prompt column (name, last text) beside them must agree.

    Its system text is that of the conversations where these begin without one.
    """
    chosen, rejected = (turns_of(value_of(row, column), column) for column in ("chosen", "rejected"))
    record = _from_conversations(row, chosen, rejected)
    if prompt is not None and prompt[1].strip() != record.turns[-1].content.strip():
        raise RowProblem(f"column `{prompt[0]}` is not the prompt that the conversation in `chosen` answers")
    return replace(record, system=system) if record.system is None else record


def _answers_in_steps(row: Row, system: str | None, turns: tuple[Turn, ...]) -> PreferenceRecord:
    """Answers of several messages (a call, its result, what is made of it): what they share joins the prompt."""
    steps = [
        turns_of(row[column], column) if _has_steps(row[column]) else (answer_of(row[column], column),)
        for column in ("chosen", "rejected")
    ]
    record = _from_conversations(row, turns + steps[0], turns + steps[1])
    return replace(record, system=system_of(row, system))


def _has_steps(answer: object) -> bool:
    """Is it a list of messages that are not all the assistant's?"""
    return isinstance(answer, list) and any(isinstance(m, Mapping) and m.get("role") != "assistant" for m in answer)


def _from_conversations(row: Row, chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> PreferenceRecord:
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant" or len(turns) < 2:
            raise RowProblem(f"column `{column}` must be a conversation that ends with the assistant's answer")
    if chosen[:-1] != rejected[:-1]:
        raise RowSkipped(PART_EARLY)
    system, turns = split_system(chosen[:-1], "chosen")
    answers = chosen[-1], rejected[-1]
    return _record(row, system_of(row, system), turns, answers, ("prompt", "chosen", "rejected", "system"))


# --- the formats, in the order in which they are tried --------------------------------------------


def _has(*names: str) -> Callable[[Columns], bool]:
    return lambda columns: all(name in columns for name in names)


_PAIR = ("chosen", "rejected")
_TRL = ("prompt", *_PAIR)
_SCORED = (*_TRL, "score_chosen", "score_rejected")
_SERVICES = ("input", "preferred_output", "non_preferred_output")
_KTO = ("prompt", "completion", "label")
_MESSAGES = ("answer", "conversation")
_LISTS = ("list", *_MESSAGES)

FORMATS: dict[str, Format] = {
    "Orca pairs": Format(("question", *_PAIR), _has("question", *_PAIR), read_orca),
    "alpaca pairs": Format(
        ("instruction", *_PAIR), lambda c: _has("instruction", *_PAIR)(c) and "prompt" not in c, read_alpaca
    ),
    "UltraFeedback": Format(_SCORED, _has(*_SCORED), read_ultrafeedback),
    "TRL conversational": Format(
        _TRL,
        lambda c: _has(*_TRL)(c) and (c["chosen"] in _MESSAGES or c["prompt"] in _MESSAGES),
        read_prompted,
    ),
    "TRL standard": Format(_TRL, _has(*_TRL), read_prompted),
    "ShareGPT pairs": Format(("conversations", *_PAIR), _has("conversations", *_PAIR), read_sharegpt),
    "TRL implicit prompt": Format(_PAIR, lambda c: _has(*_PAIR)(c) and c["chosen"] == "conversation", read_implicit),
    "HH-RLHF": Format(_PAIR, lambda c: _has(*_PAIR)(c) and c["chosen"] == "dialogue", read_hh),
    "KTO labels": Format(_KTO, _has(*_KTO), read_kto, by_prompt=True),
    "ranked answers": Format(
        ("instruction", "completions"),
        lambda c: any(c.get(name) in _LISTS for name in RANKED) and any(name in c for name in PROMPTS),
        read_ranked,
    ),
    "fine-tuning service": Format(_SERVICES, _has(*_SERVICES), read_services),
}


def _fit(needs: Sequence[str], names: Sequence[str]) -> float:
    """How much of `needs` is among `names`; a near miss counts for half, as a misspelling must lead home."""
    return sum(1.0 if need in names else 0.5 if did_you_mean(need, names) else 0.0 for need in needs) / len(needs)
