"""The model class beside lm-eval's own, request by request, on tiny models of other families."""

from __future__ import annotations

import copy
import random
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import Registry, get_model
from lm_eval.models.huggingface import HFLM

from preftree.errors import ModelError
from preftree.evaluate.cache import RequestCache, model_key
from preftree.evaluate.harness import PreftreeLM
from tests.evaluate.conftest import asked, words
from tests.support import tiny

FAMILIES = {name: tiny.FAMILIES[name] for name in ("llama", "qwen2", "gemma2", "mpt", "gpt_neox")}


def questions(seed: int = 0) -> list[Instance]:
    """Shots shared by questions, one-token and longer options, spaces at the seam, empty contexts, too long ones."""
    rng = random.Random(seed)
    shots, pairs = words(rng, 30), []
    for number in range(4):
        context = (shots + "\n\n" if number % 2 else "") + words(rng, rng.randint(1, 9))
        pairs += [(context, " " + words(rng, rng.randint(1, 6))) for _ in range(3)]
        pairs += [(context, " w7"), (context, " w8"), (context + "  ", words(rng, 2))]
    pairs += [("", words(rng, 3)), ("", "<bos> w9 w10"), (words(rng, 300), " w11 w12"), (words(rng, 256), " w13")]
    return asked("loglikelihood", [*pairs, pairs[0]])


def both(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[PreftreeLM, HFLM]:
    model = FAMILIES[family]().to(dtype)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # sdpa leaves its softcap out, in lm-eval too
    tokenizer = tiny.word_tokenizer()
    other = HFLM(pretrained=copy.deepcopy(model), tokenizer=tokenizer, batch_size=2, **options)
    return PreftreeLM(model, tokenizer=tokenizer, tokens_per_forest=64, **options), other


def same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]], error: float = 1e-9) -> None:
    assert [a[0] for a in found] == pytest.approx([b[0] for b in expected], abs=error)
    assert [a[1] for a in found] == [b[1] for b in expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihoods_are_lm_evals(family: str) -> None:
    ours, theirs = both(family, **({"max_length": 256} if family == "mpt" else {}))  # lm-eval itself does not see it
    assert ours.streams
    assert ours.max_length == PreftreeLM(ours.model, tokenizer=ours.tokenizer).max_length == 256
    found, expected = ours.loglikelihood(questions()), theirs.loglikelihood(questions(), disable_tqdm=True)
    same(found, expected, 1e-5)
    assert ours.truncated == 1


@pytest.mark.parametrize("options", [{"add_bos_token": True}, {"max_length": 20}, {"prefix_token_id": 3}], ids=str)
def test_text_becomes_tokens_as_in_lm_eval(options: dict[str, Any]) -> None:
    ours, theirs = both("llama", **options)
    found, expected = ours.loglikelihood(questions(1)), theirs.loglikelihood(questions(1), disable_tqdm=True)
    same(found, expected)


def test_rolling_and_generation_are_lm_evals() -> None:
    ours, theirs = both("llama", max_length=40)
    rng = random.Random(2)
    texts = asked("loglikelihood_rolling", [(words(rng, count),) for count in (3, 39, 100)])
    found = ours.loglikelihood_rolling(texts)
    assert found == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-9)
    ways = {"until": ["w50"], "max_gen_toks": 8, "do_sample": False}
    prompts = asked("generate_until", [(words(rng, count), ways) for count in (3, 9, 5)])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


def test_bfloat16_is_as_near_as_lm_eval_is_to_itself() -> None:
    ours, theirs = both("llama", torch.bfloat16)
    one = HFLM(pretrained=theirs.model, tokenizer=theirs.tokenizer, batch_size=1)
    exact, _ = both("llama")
    exact.model.load_state_dict({k: v.double() for k, v in theirs.model.state_dict().items()})
    truth, found = exact.loglikelihood(questions()), ours.loglikelihood(questions())
    a, b = theirs.loglikelihood(questions(), disable_tqdm=True), one.loglikelihood(questions(), disable_tqdm=True)

    def far(answers: list[tuple[float, bool]]) -> float:
        return sum(abs(x[0] - y[0]) for x, y in zip(answers, truth, strict=True))

    assert far(found) <= 1.5 * max(far(a), far(b))


def test_a_chat_template_is_applied_by_lm_eval() -> None:
    model, template = tiny.llama(), "{% for m in messages %}<turn> {{ m['content'] }} {% endfor %}"
    tokenizer = tiny.word_tokenizer(template)
    turns = [{"role": "user", "content": "w5 w6"}]
    ours = PreftreeLM(model, tokenizer=tokenizer)
    assert ours.apply_chat_template(turns) == HFLM(pretrained=model, tokenizer=tokenizer).apply_chat_template(turns)


def test_lm_eval_finds_it_by_name() -> None:
    assert get_model("preftree") is PreftreeLM


def test_the_entry_point_is_the_model_class(repo_root: Path) -> None:
    """lm-eval after 0.4.13 finds models by this group, and loads the entry point when its name is asked for."""
    declared = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    entry = EntryPoint("preftree", declared["preftree"], "lm_eval.models")
    registry: Registry[Any] = Registry("models")
    registry.register("preftree", target=entry)
    assert registry.get("preftree") is PreftreeLM


def test_a_killed_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both("llama")
    expected = ours.loglikelihood(questions())
    key = model_key(ours.model, ours.settings)
    ours.remember(RequestCache(tmp_path / key))
    assert ours.loglikelihood(questions()) == expected
    (file,) = (tmp_path / key).glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:10]) + lines[10][:9])  # killed while it wrote the eleventh answer
    again, _ = both("llama")
    assert model_key(again.model, again.settings) == key
    again.remember(RequestCache(tmp_path / key))
    computed: list[int] = []
    score = again._loglikelihood_tokens
    monkeypatch.setattr(again, "_loglikelihood_tokens", lambda r, **o: computed.append(len(r)) or score(r, **o))
    same(again.loglikelihood(questions()), expected)
    assert computed == [1, len({q.args for q in questions()}) - 10]  # one answer of the cache is tried first
    computed.clear()
    same(again.loglikelihood(questions()), expected)
    assert computed == []


def test_what_is_sampled_is_not_remembered(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path)
    cache.add_partial("generate_until", ("w5", {"do_sample": True}), "w6")
    assert len(cache) == 0
    ours, _ = both("llama")
    ours.remember(cache)
    ways = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 5.0}
    answers = ours.generate_until(asked("generate_until", [("w5 w6", ways)] * 4))
    assert len(set(answers)) > 1


def test_models_without_trees_go_lm_evals_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftree.evaluate.harness.can_stream", lambda scorer: (False, "no"))
    ours, theirs = both("llama")
    same(ours.loglikelihood(questions()), theirs.loglikelihood(questions(), disable_tqdm=True))


def test_too_long_requests_can_be_refused() -> None:
    ours = PreftreeLM(tiny.llama(), tokenizer=tiny.word_tokenizer(), on_truncation="refuse")
    with pytest.raises(ModelError, match=r"1 of 11 contexts .* 256 positions, by up to 45 tokens.*--num_fewshot"):
        ours.loglikelihood(questions())
    with pytest.raises(ModelError, match="an answer of 300 tokens is longer"):
        ours.loglikelihood(asked("loglikelihood", [("w5", " " + words(random.Random(0), 300))]))


def merge_into_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tokenizers put a context's last word and an answer " w9" into one token, as byte-level merges do."""
    encode = HFLM.tok_encode

    def merged(lm: HFLM, string: str, *arguments: Any, **options: Any) -> list[int]:
        return list(encode(lm, string.removesuffix(" w9"), *arguments, **options))

    monkeypatch.setattr(HFLM, "tok_encode", merged)
    monkeypatch.setattr(PreftreeLM, "_encode_together", lambda self, requests: None)


@pytest.mark.parametrize("streams", [True, False], ids=["trees", "lm-eval's batches"])
def test_an_answer_without_a_token_of_its_own_is_named(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own code ends in an AssertionError, the trees ended in a ValueError."""
    monkeypatch.setattr("preftree.evaluate.harness.can_stream", lambda scorer: (streams, "test"))
    ours, theirs = both("llama")
    merge_into_contexts(monkeypatch)
    requests = asked("loglikelihood", [("w5 w6", " w7"), ("w8", " w9")])
    with pytest.raises(AssertionError):
        theirs.loglikelihood(requests, disable_tqdm=True)
    with pytest.raises(
        ModelError, match=r"task task, question 1, option 1 ' w9' cannot be scored.*no token of its own"
    ):
        ours.loglikelihood(requests)


def test_an_answer_that_is_longer_than_the_positions_is_named() -> None:
    ours, _ = both("llama", max_length=8)
    with pytest.raises(ModelError, match=r"an answer of 9 tokens is longer .*question 1"):
        ours.loglikelihood(asked("loglikelihood", [("w5", " w7"), ("w5", " " + words(random.Random(0), 9))]))


def test_a_path_that_does_not_fit_into_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both("llama")

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("preftree.model.stream.token_scores", fail)
    with pytest.raises(ModelError, match=r"out of memory: task task, question \d.* does not fit"):
        ours.loglikelihood(asked("loglikelihood", [("w5 w6", " w7"), ("w8", " w9")]))


def test_out_of_memory_in_lm_evals_batches_halves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftree.evaluate.harness.can_stream", lambda scorer: (False, "no"))
    model, tokenizer = tiny.llama().double(), tiny.word_tokenizer()
    ours, call, sizes = PreftreeLM(model, tokenizer=tokenizer, batch_size=8), HFLM._model_call, list[int]()
    expected = ours.loglikelihood(questions())

    def small(lm: HFLM, inputs: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(inputs))
        return call(lm, inputs, *arguments, **options)

    monkeypatch.setattr(HFLM, "_model_call", small)
    most = 3
    same(ours.loglikelihood(questions()), expected)
    assert max(sizes) == 2
    most = 0
    with pytest.raises(ModelError, match="out of memory with one request per batch"):
        ours.loglikelihood(questions())
