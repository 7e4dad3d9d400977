"""Scoring of requests against the model's own logits on single sequences, for every family."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import PeftModel

from preftree.errors import ModelError
from preftree.forest import ScoreRequest, Stream, Stretch
from preftree.model import logprob, stream
from preftree.model.score import attach
from preftree.model.stream import PathTooLong, RequestScore, can_stream, score_requests
from tests.support import tiny


def requests(seed: int = 0) -> list[ScoreRequest]:
    """A shared prefix, options that begin alike, one-token options, a repeated request."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(tiny.VOCABULARY) for _ in range(count))

    prefix, found = ids(25), []
    for number in range(5):
        context, stem = (prefix if number % 2 else ()) + ids(rng.randint(1, 12)), ids(4)
        found += [ScoreRequest(context, stem[: rng.randint(0, 4)] + ids(rng.randint(1, 5))) for _ in range(3)]
        found.append(ScoreRequest(context, ids(1)))
    return [*found, found[2]]


def plain(model: torch.nn.Module, asked: list[ScoreRequest]) -> list[RequestScore]:
    found = []
    for request in asked:
        ids, count = torch.tensor(request.context + request.continuation), len(request.continuation)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -count - 1 : -1].double()
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[-count:, None])
        found.append(RequestScore(float(logprobs.sum()), bool((logits.argmax(1) == ids[-count:]).all())))
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_do_not_depend_on_the_cuts(family: str) -> None:
    model = tiny.FAMILIES[family]().double()
    with tiny.attention_of(model, "eager"):
        expected = plain(model, requests())
    scorer = attach(model)
    assert can_stream(scorer)[0]
    for budget in (1, 17, 1000):
        found = score_requests(scorer, requests(), budget)
        for a, b in zip(found, expected, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)  # Gemma 2 casts to float32 inside
            assert a.greedy == b.greedy


def test_greedy_answers_are_found() -> None:
    model = tiny.llama().double()
    context = torch.tensor([[5, 6, 7, 8]])
    ids = model.generate(context, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    other = [*ids[:3], (ids[3] + 1) % tiny.VOCABULARY]
    found = score_requests(
        attach(model), [ScoreRequest((5, 6, 7, 8), tuple(answer)) for answer in (ids, other, ids[:1])], 3
    )
    assert [answer.greedy for answer in found] == [True, False, True]


def test_adapters_count_and_modes_come_back() -> None:
    adapted = tiny.with_lora(tiny.qwen2().double())
    assert isinstance(adapted, PeftModel)
    adapted.train()
    scorer = attach(adapted)
    found = score_requests(scorer, requests(), 50)
    assert adapted.training
    with adapted.disable_adapter():
        base = score_requests(scorer, requests(), 50)
    adapted.eval()
    expected = plain(adapted, requests())
    assert [a.logprob for a in found] == pytest.approx([e.logprob for e in expected], abs=1e-6)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(found, base, strict=True)) > 0.1


def test_answers_come_as_they_are_finished() -> None:
    seen: dict[int, RequestScore] = {}
    steps: list[tuple[int, int]] = []

    def finished(index: int, answer: RequestScore) -> None:
        assert index not in seen
        seen[index] = answer

    asked = requests()
    found = score_requests(attach(tiny.llama()), asked, 20, finished, lambda done, total: steps.append((done, total)))
    assert [seen[i] for i in range(len(asked))] == found
    assert len(steps) > 2
    assert steps[-1][0] == steps[-1][1]


def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama().double()
    scorer = attach(model)
    whole = score_requests(scorer, requests(), 1000)
    monkeypatch.setattr(logprob, "SCORED_CHUNK_BYTES", 4 * tiny.VOCABULARY * 3)
    parts = score_requests(scorer, requests(), 1000)
    assert [a.greedy for a in parts] == [a.greedy for a in whole]
    assert [a.logprob for a in parts] == pytest.approx([a.logprob for a in whole], abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma2", "mpt"])
def test_the_compiled_attention_serves_streams(family: str) -> None:
    model = tiny.for_kernels(family).requires_grad_(False)
    scorer = attach(model)
    if scorer.name != "native":
        pytest.skip(f"no compiled kernels here: {scorer.reason}")
    expected = plain(model, requests())
    for budget in (1, 17, 1000):
        found = score_requests(scorer, requests(), budget)
        assert [a.logprob for a in found] == pytest.approx([b.logprob for b in expected], abs=2e-4)


def test_a_model_without_trees_has_no_streams() -> None:
    scorer = attach(tiny.llama(), "padded")
    assert can_stream(scorer) == (False, scorer.reason)
    with pytest.raises(ModelError, match="this model is scored by padded"):
        score_requests(scorer, requests(), 10)


@pytest.mark.parametrize("most", [40, 7, 1])
def test_out_of_memory_halves_the_budget_and_redoes_the_pass(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = attach(tiny.mistral().double())
    expected = score_requests(scorer, requests(), 1000)
    budgets, sizes = small_memory(monkeypatch, most), list[int]()
    finished: list[int] = []
    found = score_requests(scorer, requests(), 100, lambda index, _: finished.append(index), shrunk=sizes.append)
    assert [a.logprob for a in found] == pytest.approx([e.logprob for e in expected], abs=1e-9)
    assert [a.greedy for a in found] == [e.greedy for e in expected]
    assert sorted(finished) == list(range(len(requests())))
    assert sizes
    assert max(budgets) <= most


def test_only_a_path_that_does_not_fit_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = attach(tiny.llama().double())
    deep = ScoreRequest(tuple(range(5, 35)), (7,))
    small_memory(monkeypatch, 5, deepest=25)
    with pytest.raises(PathTooLong) as caught:
        score_requests(scorer, [ScoreRequest((5, 6), (7,)), deep], 5)
    assert (caught.value.request, caught.value.tokens) == (1, 26)


def test_other_errors_are_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(stream, "token_scores", fail)
    scorer = attach(tiny.llama())
    with pytest.raises(RuntimeError, match="a bug of ours"):
        score_requests(scorer, requests(), 50)


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int, deepest: int = 1000) -> list[int]:
    """Lets no pass of more than `most` tokens through, nor one behind a longer path; returns the sizes that were."""
    score, sizes = stream.token_scores, list[int]()

    def scores(*arguments: Any) -> Any:
        stretch = made[-1]
        if len(stretch.forest) - stretch.known > most or stretch.known >= deepest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(stretch.forest) - stretch.known)
        return score(*arguments)

    made: list[Stretch] = []
    cut = Stream.stretch

    def watched(self: Stream, *arguments: Any) -> Stretch:
        made.append(cut(self, *arguments))
        return made[-1]

    monkeypatch.setattr(Stream, "stretch", watched)
    monkeypatch.setattr(stream, "token_scores", scores)
    return sizes
