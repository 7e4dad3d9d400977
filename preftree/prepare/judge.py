"""When a sampled answer may stand as the rejected one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from preftree.model.generate import Answer
from preftree.prepare.generate import Judgement
from preftree.text.duplicates import jaccard, shingles

EMPTY = "it is empty"
CUT = "it was cut at max_new_tokens"
NO_SENTENCE = "it was cut at max_new_tokens before its first sentence ended"
LIKE_CHOSEN = "it is (nearly) the chosen answer"
LIKE_OTHER = "it is (nearly) another rejected answer"

# The end of a sentence. The dot of "2." starts a list item, it ends nothing.
_SENTENCE_END = re.compile(r"(?<!\d)[.!?](?=\s|$)")
_MIN_WORDS = 3


def judge(answer: Answer, chosen: str, others: Sequence[str], *, max_similarity: float, cut_answers: str) -> Judgement:
    """The text that is kept, or "" and why the answer is refused.

    Args:
        others: rejected answers that the prompt has already.
        max_similarity: Jaccard similarity of runs of three words from which two answers are nearly the same.
        cut_answers: what to do with an answer that reached the limit: trim, keep or drop.
    """
    if answer.failure:
        return "", answer.failure
    text = answer.text
    if not answer.finished and cut_answers == "drop":
        return "", CUT
    if not answer.finished and cut_answers == "trim":
        text = trim(answer)
        if not text:
            return "", NO_SENTENCE if answer.text.strip() else EMPTY
    if not text.strip():
        return "", EMPTY
    if similar(text, chosen, max_similarity):
        return "", LIKE_CHOSEN
    if any(similar(text, other, max_similarity) for other in others):
        return "", LIKE_OTHER
    return text, ""


def similar(a: str, b: str, threshold: float) -> bool:
    """Whether two texts are equal, or share so much of their runs of three words."""
    return a.strip() == b.strip() or jaccard(shingles(a), shingles(b)) >= threshold


def trim(answer: Answer) -> str:
    """The answer as it ended, or up to its last full sentence if it was cut; "" if there is none."""
    if answer.finished:
        return answer.text
    ends = [match.end() for match in _SENTENCE_END.finditer(answer.text)]
    text = answer.text[: ends[-1]] if ends else ""
    return text if len(text.split()) >= _MIN_WORDS else ""
