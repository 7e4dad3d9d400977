"""Drawing a token against its definition written out, and rows that do not depend on the rows beside them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.model import generate
from preftree.model.generate import Answer, Sampling, answer_batch, by_length, draw, uniforms
from tests.support import tiny

SAMPLED = Sampling(temperature=0.9, top_p=0.95)


def drawn(logits: list[float], uniform: float, sampling: Sampling) -> tuple[int, float]:
    """The definition in words: sort, keep, lay end to end; and how near the number is to a border."""
    weights = [math.exp(value / sampling.temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    order = order[: sampling.top_k or len(order)]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / total
        if sampling.top_p < 1 and mass >= sampling.top_p:
            break
    if len(kept) == len(logits) and sampling.top_p >= 1:
        kept.sort()  # nothing is cut off
    reached, borders, found = 0.0, [], kept[-1]
    for token in reversed(kept):
        found = token if uniform * mass < mass - reached else found
        reached += weights[token] / total
        borders.append(abs(uniform * mass - (mass - reached)))
    return found, min(borders[:-1], default=1.0)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 39, 100]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    likeliest=st.sampled_from([2, 7, 1024]),
)
def test_draw_is_its_definition(seed, vocabulary, temperature, top_k, top_p, likeliest) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, vocabulary, generator=random)
    uniform = torch.rand(3, generator=random, dtype=torch.float64)
    sampling = Sampling(temperature, top_k, top_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_NUCLEUS_CANDIDATES", likeliest)  # so that the nucleus lies beyond it, too
        found = draw(logits, uniform, sampling).tolist()
    for row in range(3):
        token, border = drawn(logits[row].tolist(), float(uniform[row]), sampling)
        assert found[row] == token or border < 1e-9


def test_the_shares_of_drawn_tokens_are_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    uniform = uniforms([7], 20_000)[0]
    tokens = draw(logits.expand(20_000, -1), uniform, Sampling(temperature=1.0))
    shares = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(shares, logits.softmax(-1)[0], atol=0.015, rtol=0)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(num_hidden_layers=2).double()


def prompts(count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    sizes = torch.randint(3, 14, (count,), generator=random).tolist()
    return [torch.randint(5, tiny.VOCABULARY, (size,), generator=random).tolist() for size in sizes]


def test_a_row_is_the_same_alone_and_among_others(model) -> None:
    tokenizer, asked, seeds = tiny.word_tokenizer(), prompts(6), [11, 12, 13, 14, 15, 16]
    together = answer_batch(model, tokenizer, asked, 8, SAMPLED, seeds)
    alone = [answer_batch(model, tokenizer, [p], 8, SAMPLED, [s])[0] for p, s in zip(asked, seeds, strict=True)]
    assert together == alone
    backwards = answer_batch(model, tokenizer, asked[::-1], 8, SAMPLED, seeds[::-1])
    assert backwards == together[::-1]
    assert answer_batch(model, tokenizer, asked, 8, SAMPLED, [s + 1 for s in seeds]) != together


def test_greedy_takes_the_likeliest_token_at_each_step(model) -> None:
    tokenizer, asked = tiny.word_tokenizer(), prompts(4)
    for prompt, answer in zip(asked, answer_batch(model, tokenizer, asked, 6), strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        new = ids[len(prompt) :]
        finished = new[-1] == tokenizer.eos_token_id
        assert answer == Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), finished)


def test_an_answer_ends_at_a_stop_token_and_says_so(model) -> None:
    tokenizer = tiny.word_tokenizer()
    answers = answer_batch(model, tokenizer, prompts(6), 6)
    asked, whole = next((p, a) for p, a in zip(prompts(6), answers, strict=True) if len(set(a.text.split())) > 2)
    words = whole.text.split()
    place = next(i for i in range(1, 6) if words[i] not in words[:i])
    (cut,) = answer_batch(model, tokenizer, [asked], 6, stops=[tokenizer.convert_tokens_to_ids(words[place])])
    assert cut == Answer(" ".join(words[:place]), True)
    assert not whole.finished


def test_the_models_own_habits_and_the_global_seed_do_not_matter(model) -> None:
    tokenizer, asked = tiny.word_tokenizer(), prompts(3)
    before = answer_batch(model, tokenizer, asked, 8, SAMPLED, [1, 2, 3])
    config = model.generation_config
    kept = config.to_dict()
    try:
        config.update(repetition_penalty=5.0, temperature=0.1, top_k=1, do_sample=True)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        model.train()
        assert answer_batch(model, tokenizer, asked, 8, SAMPLED, [1, 2, 3]) == before
        assert model.training
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        model.eval()
        config.update(**kept)


def test_by_length_is_from_long_to_short_and_stable() -> None:
    assert by_length([3, 7, 3, 9]) == [3, 1, 0, 2]
