"""Rows with K answers to a prompt, each with a score or a rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftree.data.fields import (
    RowSkipped,
    extra_of,
    number,
    prompt_of,
    rank_of,
    system_of,
)
from preftree.data.files import Row
from preftree.data.messages import RowProblem, answer_of, found, is_message
from preftree.data.normalize import RANKED, TEXT_KEYS
from preftree.data.record import PreferenceRecord, Response, Turn

TOO_FEW = "fewer than two answers with a rank or score"

PROMPTS = ("instruction", "prompt", "question")
# The mean of UltraFeedback's four aspects before its overall score, in which some 10s stand for 1s.
_SCORES = ("score", "fine-grained_score", "rating", "reward", "overall_score")

_ABOUT = (*_SCORES, "rank", "model", "annotations")


def read_ranked(row: Row) -> PreferenceRecord:
    """K answers to a prompt, each with a score or a rank: UltraFeedback's `instruction` and `completions`,
    Nectar's `prompt` and `answers`, and `responses` with `scores` or `ranks` beside them.

    Answers are texts or objects. An answer whose score or rank is missing is left out.
    """
    prompt, column = (next(name for name in names if name in row) for names in (PROMPTS, RANKED))
    given = row[column]
    if not isinstance(given, list):
        raise RowProblem(f"column `{column}` must be a list of answers. Got {found(given)} instead.")
    beside = next((name for name in ("ranks", "scores") if row.get(name) is not None), None)
    if beside is None:
        answers = [_ranked_answer(answer, column, number) for number, answer in enumerate(given, 1)]
    else:
        answers = _beside(row, column, beside)
    ranked = tuple(answer for answer in answers if answer.rank is not None or answer.score is not None)
    if len(ranked) < 2:
        raise RowSkipped(TOO_FEW)
    system, turns = prompt_of(row, prompt)
    extra = extra_of(row, (prompt, column, "ranks", "scores", "system", "system_prompt"))
    return PreferenceRecord(system_of(row, system), turns, ranked, extra=extra)


def _ranked_answer(answer: object, column: str, place: int) -> Response:
    where = f"column `{column}`, answer {place}"
    if not isinstance(answer, Mapping):
        raise RowProblem(f"{where}: it has neither a rank nor a score; add a column `scores` or `ranks` for them.")
    said = _said(answer, column, place)
    scores = [answer[name] for name in _SCORES if answer.get(name) is not None]
    if not scores and isinstance(answer.get("annotations"), Mapping):
        scores = _aspects(answer["annotations"])
    score = number(scores[0], where) if scores else None
    return Response(said.content, score, rank_of(answer.get("rank"), where), said.keys)


def _said(answer: object, column: str, place: int) -> Turn:
    """What an answer says: a text, an object with its text under one of `TEXT_KEYS`, or a message."""
    where, within = f"column `{column}`, answer {place}", f"{column}[{place - 1}]"
    if isinstance(answer, list):
        return answer_of(answer, within)
    if is_message(answer):
        return answer_of([{key: value for key, value in dict(answer).items() if key not in _ABOUT}], within)
    if not isinstance(answer, Mapping):
        if not isinstance(answer, str):
            raise RowProblem(f"{where} must be text. Got {found(answer)} instead.")
        return Turn("assistant", answer)
    key = next((key for key in TEXT_KEYS if key in answer), None)
    if key is None or not isinstance(answer[key], str):
        got = found(answer[key]) if key else f"only {', '.join(map(str, answer)) or 'nothing'}"
        raise RowProblem(f"{where} must have its text under one of {', '.join(TEXT_KEYS)}. Got {got} instead.")
    return Turn("assistant", answer[key])


def _aspects(annotations: Mapping[str, Any]) -> list[float]:
    """The mean of UltraFeedback's ratings (helpfulness, honesty, …), as a list of one, or of none."""
    ratings = [str(rating.get("Rating")) for rating in annotations.values() if isinstance(rating, Mapping)]
    known = [float(rating) for rating in ratings if rating.replace(".", "", 1).isdigit()]  # else "N/A"
    return [sum(known) / len(known)] if known else []


def _beside(row: Row, column: str, beside: str) -> list[Response]:
    """Answers whose ranks or scores are a list of their own."""
    texts, values = row[column], row[beside]
    if not isinstance(values, list) or len(values) != len(texts):
        got = f"{len(values)} values" if isinstance(values, list) else found(values)
        raise RowProblem(f"column `{beside}` must hold {len(texts)} values, one for each answer. Got {got} instead.")
    answers = []
    for i, (answer, value) in enumerate(zip(texts, values, strict=True), start=1):
        where = f"column `{beside}`, value {i}"
        said = _said(answer, column, i)
        missing = value is None or value == "N/A"
        score = None if missing or beside == "ranks" else number(value, where)
        rank = None if missing or beside == "scores" else rank_of(value, where)
        answers.append(Response(said.content, score, rank, said.keys))
    return answers
