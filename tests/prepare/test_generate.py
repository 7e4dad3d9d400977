"""Rounds, seeds and the journal: the same answers whatever is killed, in whatever order they come."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from preftree.errors import RunError
from preftree.model.generate import Answer
from preftree.prepare.generate import Generated, Prompt, SamplingPlan, Unit, generate, seed_of
from preftree.prepare.journal import Journal
from preftree.prepare.judge import judge
from preftree.prepare.workers import InProcess, Threads
from tests.support.prepare import Backwards

PLAN = SamplingPlan(seed=3, answers=2, batch_size=3, rounds=4)


def a_prompt(name: str) -> Prompt:
    def verdict(answer: Answer, others) -> tuple[str, str]:
        return judge(answer, "n0", others, max_similarity=0.8, cut_answers="keep")

    return Prompt(name, lambda number, attempt: [{"role": "user", "content": name}], verdict)


PROMPTS = [a_prompt("x" * (1 + 7 * i % 5) + str(i)) for i in range(11)]


def speak(unit: Unit) -> list[Answer]:
    """Answers that follow from prompt and seed, often equal to the chosen one or to each other."""
    return [Answer(f"n{random.Random(f'{r.prompt}{r.seed}').randrange(4)}", True) for r in unit]


def render(messages):
    return messages[0]["content"], len(messages[0]["content"])


class Counting:
    """An engine that remembers what it was asked."""

    def __init__(self) -> None:
        self.units: list[Unit] = []

    def __call__(self, unit: Unit) -> list[Answer]:
        self.units.append(unit)
        return speak(unit)


def run(path: Path, workers=None, engine=speak, prompts=PROMPTS, plan=PLAN) -> Generated:
    return generate(prompts, plan, render, workers or InProcess(), lambda: engine, Journal(path))


def test_what_is_kept(tmp_path: Path) -> None:
    engine = Counting()
    result = run(tmp_path / "j", engine=engine)
    for prompt, kept in zip(PROMPTS, result.kept, strict=True):
        texts = [answer.text for answer in kept]
        assert len(set(texts)) == len(texts) <= PLAN.answers
        assert "n0" not in texts
        for answer in kept:  # the recorded seed asks for the same answer again
            assert answer.seed in {seed_of(PLAN.seed, prompt.key, number, answer.round) for number in range(2)}
            name = prompt.messages(0, 0)[0]["content"]
            assert answer.text == f"n{random.Random(f'{name}{answer.seed}').randrange(4)}"
    seeds = [request.seed for unit in engine.units for request in unit]
    assert len(set(seeds)) == len(seeds)
    missing = sum(PLAN.answers - len(kept) for kept in result.kept)
    assert result.given_up.total() == missing
    assert sum(map(len, result.kept)) + result.refused.total() == len(seeds)
    assert any(answer.round > 0 for kept in result.kept for answer in kept)  # resampling did happen


def test_batches_hold_what_is_similar_in_length_and_never_more_than_asked(tmp_path: Path) -> None:
    engine = Counting()
    run(tmp_path / "j", engine=engine, plan=SamplingPlan(seed=3, batch_size=4, rounds=1))
    lengths = [[len(request.prompt) for request in unit] for unit in engine.units]
    assert [len(unit) for unit in lengths] == [4, 4, 3]
    flat = [length for unit in lengths for length in unit]
    assert flat == sorted(flat, reverse=True)


def test_a_journal_cut_at_any_byte_leads_to_the_same_result_and_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    whole = run(path)
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        assert run(path) == whole
        assert path.read_bytes() == content


def test_nothing_is_asked_twice_and_no_engine_is_made_for_nothing(tmp_path: Path) -> None:
    path, first, second = tmp_path / "j", Counting(), Counting()
    run(path, engine=first)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]))
    run(path, engine=second)
    assert first.units[5:] == second.units
    again = generate(PROMPTS, PLAN, render, InProcess(), lambda: pytest.fail("made"), Journal(path))
    assert again == run(path)


@pytest.mark.parametrize("workers", [Backwards(), Threads(3)], ids=["backwards", "threads"])
def test_the_order_of_work_does_not_matter(tmp_path: Path, workers) -> None:
    assert run(tmp_path / "a", workers) == run(tmp_path / "b")


def test_answers_do_not_depend_on_the_other_prompts(tmp_path: Path) -> None:
    whole = run(tmp_path / "a")
    some = run(tmp_path / "b", prompts=PROMPTS[4:7][::-1])
    assert some.kept == whole.kept[4:7][::-1]


def test_an_entry_made_for_something_else_is_not_taken(tmp_path: Path) -> None:
    run(tmp_path / "j", plan=SamplingPlan(seed=4, answers=2, batch_size=3))
    assert run(tmp_path / "j").kept == run(tmp_path / "new").kept


def test_an_error_in_a_thread_comes_after_what_was_in_hand(tmp_path: Path) -> None:
    def fail_late(unit: Unit) -> list[Answer]:
        if unit[0].prompt.endswith("4"):
            raise RunError("the server is gone")
        return speak(unit)

    plan = SamplingPlan(seed=3, batch_size=1, rounds=1)
    with pytest.raises(RunError, match="gone"):
        run(tmp_path / "j", Threads(2), fail_late, plan=plan)
    assert 0 < len(Journal(tmp_path / "j")) < len(PROMPTS)
    assert run(tmp_path / "j", plan=plan) == run(tmp_path / "new", plan=plan)
