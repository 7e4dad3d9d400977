"""Refusals, damage, languages, duplicates and overlap: by hand, by slow references, and on real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.benchmarks import BENCHMARKS
from preftree.errors import DataError
from preftree.text.damage import CONTROL, MOJIBAKE, REPLACED, SURROGATE, damage, repaired
from preftree.text.duplicates import NearDuplicates, exact_key, jaccard, shingles, words
from preftree.text.language import language
from preftree.text.overlap import BenchmarkQuestion, OverlapIndex, question_of, read_test_questions
from preftree.text.refusals import is_refusal

# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I can’t assist with that.",
        " I cannot fulfill your request. I'm just an AI.",
        "As an AI language model, I am not able to browse the internet.",
        "Unfortunately, as an AI language model, I don't have the capability to draw.",
        "I apologize, but it is not appropriate to discuss this topic.",
        "I must decline to answer this.",
        "Sorry, I won't help with breaking into a car.",
        "I don't have access to real-time data.",
        "I'm not comfortable writing that.",
    ],
)
def test_a_refusal(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I'm sorry to hear that you are ill. Rest a lot.",
        "No, we cannot conclude that he was more popular.",
        "No I can't",
        "As an AI assistant, I would suggest three steps.",
        "As an AI language model, I cannot draw. However, I can describe it: a red house.",
        "I cannot run code, but here is what it would print: 3",
        "I cannot be certain, the text does not say.",
        "Dear Sir or Madam, thank you for your kind letter. I cannot accept the offer.",
        "You can't divide by zero.",
        "Here is a poem: I cannot sleep, I cannot eat",
    ],
)
def test_no_refusal(answer: str) -> None:
    assert not is_refusal(answer)


def test_refusals_in_real_answers(samples: Path) -> None:
    # Read by eye: the refusals among 120 answers.
    rows = [json.loads(line) for line in (samples / "pref/orca_pairs.jsonl").read_text("utf-8").split("\n") if line]
    assert sum(is_refusal(row["chosen"]) for row in rows) == 0
    refused = [row["rejected"][:60] for row in rows if is_refusal(row["rejected"])]
    assert len(refused) == 3, refused


# --- damage ---------------------------------------------------------------------------------------

SOUND = [
    "plain", "naïve café, Größe “Ü” – Ж 中文 😀", "tab\tline\r\n", "SPAß—und", "Â", "Ã la carte", "FÖÖ”", "x² ≤ 3 °C",
]  # fmt: skip


@pytest.mark.parametrize("text", SOUND)
def test_a_sound_text(text: str) -> None:
    assert damage(text) == []
    assert repaired(text) == text


@pytest.mark.parametrize(
    ("text", "kind", "whole"),
    [
        ("itâ€™s a cafÃ©", MOJIBAKE, "it’s a café"),
        ("GrÃ¶ÃŸe", MOJIBAKE, "Größe"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", MOJIBAKE, "привет"),
        ("a\x00b\x07c", CONTROL, "abc"),
        ("é. \x85a", CONTROL, "é. a"),
        ("lost \ufffd here", REPLACED, "lost \ufffd here"),
        ("half \ud83d pair", SURROGATE, "half  pair"),
    ],
)
def test_a_damaged_text(text: str, kind: str, whole: str) -> None:
    assert damage(text) == [kind]
    assert repaired(text) == whole


@given(st.text(st.characters(codec="utf-8"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_repaired_text_holds_no_controls(text: str) -> None:
    assert CONTROL not in damage(repaired(text))


# --- language -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The quick brown fox jumps over the lazy dog, and nobody knows why it did.", "en"),
        ("Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß, warum.", "de"),
        ("我不知道为什么这只狐狸要跳过那只懒狗。", "zh"),
        ("Это предложение написано на русском языке, чтобы проверить определение.", "ru"),
        ("Yes", None),
        ("592480877284 + 57155914195733 = 57748395073017, 592480877284 - 3", None),
    ],
)
def test_language(text: str, code: str | None) -> None:
    assert language(text) == code


# --- duplicates -----------------------------------------------------------------------------------


def test_keys() -> None:
    assert exact_key("ab", "c") != exact_key("a", "bc")
    assert exact_key("A b") != exact_key("a b")
    assert exact_key("\ud800") != exact_key("?")


def test_near_duplicates_against_jaccard(samples: Path) -> None:
    rows = [json.loads(x) for x in (samples / "pref/openorca_questions.jsonl").read_text("utf-8").split("\n") if x]
    texts = [row["question"] for row in rows]
    # Variants at known distances, and what the slow comparison of all pairs says.
    texts += [f"{text} One more." for text in texts[:10]] + [text.upper() for text in texts[10:20]]
    sets = [shingles(text) for text in texts]
    index = NearDuplicates[int](0.8)
    for i, text in enumerate(texts):
        found = index.add(i, text)
        assert found == sorted(found)
        for j in range(i):
            similarity = jaccard(sets[i], sets[j])
            if similarity >= 0.95:
                assert j in found, (i, j, similarity)
            if similarity < 0.6:
                assert j not in found, (i, j, similarity)
        assert index.find(text)[-1:] == ([i] if sets[i] else []) or i in index.find(text)


def test_near_duplicates_of_nothing() -> None:
    index = NearDuplicates[str]()
    assert index.add("a", "") == [] == index.add("b", "…")
    assert len(index) == 0
    with pytest.raises(ValueError, match="threshold"):
        NearDuplicates[str](0)


# --- overlap --------------------------------------------------------------------------------------

LONG = "An astronomer observes that a planet rotates faster after a meteorite impact. Which is the likely effect?"
SHORT = "Which skin surface produces most heat?"  # six words
QUESTIONS = [
    BenchmarkQuestion("ARC", "a:1", LONG),
    BenchmarkQuestion("ARC", "a:2", SHORT),
    BenchmarkQuestion("TruthfulQA", "t:1", "Do you dream?"),
]


def held(text: str, index: OverlapIndex | None = None) -> list[str]:
    return [hit.question.place for hit in (index or OverlapIndex(QUESTIONS)).find(text)]


def test_overlap_by_hand() -> None:
    index = OverlapIndex(QUESTIONS)
    assert (len(index), index.too_short) == (2, 1)
    assert held(f"Answer this: {LONG.upper()} A, B or C?") == ["a:1"]
    assert held(f"x {SHORT} y") == ["a:2"]
    assert held("Which skin surface produces heat?") == []
    assert held(" ".join(LONG.split()[:8])) == []  # 8 of 17 words
    assert held(" ".join(LONG.split()[:9])) == ["a:1"]
    assert held("") == held("Do you dream?") == []


def covered_slowly(question: str, text: str, run: int) -> float:
    ours, theirs = words(question), words(text)
    size = min(run, len(ours))
    places = set()
    for i in range(len(ours) - size + 1):
        if any(theirs[j : j + size] == ours[i : i + size] for j in range(len(theirs) - size + 1)):
            places |= set(range(i, i + size))
    return len(places) / len(ours)


few_words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=14).map(" ".join)


@given(st.lists(few_words, min_size=1, max_size=4), few_words, st.integers(2, 6))
@settings(max_examples=150, deadline=None)
def test_overlap_against_the_definition(questions: list[str], text: str, run: int) -> None:
    index = OverlapIndex((BenchmarkQuestion("B", str(i), q) for i, q in enumerate(questions)), ngram=run)
    expected = {
        str(i): covered
        for i, q in enumerate(questions)
        if len(words(q)) >= 5 and (covered := covered_slowly(q, text, run)) >= 0.5
    }
    assert {hit.question.place: hit.covered for hit in index.find(text)} == expected


def test_test_sets_in_a_folder(samples: Path) -> None:
    said: list[str] = []
    questions = list(read_test_questions(samples / "eval", said.append))
    index = OverlapIndex(questions)
    assert sum(index.counts().values()) + index.too_short == len(questions) == 60 + 40 + 60 + 40
    assert set(index.counts()) == {"ARC", "HellaSwag", "MMLU", "TruthfulQA"}
    assert len(said) == 1
    assert said[0].endswith("arc_challenge_train.jsonl, hellaswag_train.jsonl, mmlu_dev.jsonl")
    missed = [q for q in index.questions if q.place not in held(f"Question: {q.text}\nAnswer:", index)]
    assert not missed


def test_a_folder_without_test_sets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="holds no test question"):
        list(read_test_questions(tmp_path))
    with pytest.raises(DataError, match="is no folder"):
        list(read_test_questions(tmp_path / "b"))
    assert question_of({"question": "x"}) is None


def test_rows_as_evaluate_exports_them_are_recognized() -> None:
    """HellaSwag's local files hold the two parts of a context, not the whole: they are test questions all the same."""
    for benchmark in BENCHMARKS:
        row = dict.fromkeys(benchmark.fields, "x")
        found = question_of(row, "f:1")
        assert found is not None, benchmark.heading
        assert (found.benchmark, found.place) == (benchmark.heading, "f:1")
    exported = question_of(
        {"activity_label": "Baking", "ctx_a": "A cook bakes.", "ctx_b": "he", "endings": [], "label": "0"}
    )
    whole = question_of({"ctx": "A cook bakes. he", "endings": []})
    assert exported is not None
    assert whole is not None
    assert exported.text == whole.text
