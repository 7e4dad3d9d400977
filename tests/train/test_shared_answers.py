"""An answer that is in several pairs of a prompt is computed once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.data.encode import EncodedPair
from preftree.data.record import PAIR_RULES
from preftree.evaluate.preference import score_pairs
from preftree.forest import Forest, Shape, forests_of_pairs, grow, shard_pairs
from preftree.forest.pairs import bundles_of_pairs
from preftree.model.score import attach, leaf_logprobs
from preftree.train.answers import AnswerOrder, pair_logps
from preftree.train.losses import LossSettings
from preftree.train.objective import Objective
from preftree.train.reference import Reference
from preftree.train.reference_models import AdapterOff
from tests.support import tiny

Step = tuple[torch.Tensor, dict[str, torch.Tensor]]

MODEL = tiny.with_lora(tiny.llama(num_hidden_layers=2).double())
SCORER = attach(MODEL, "dense")
OBJECTIVE = Objective(settings=LossSettings(beta=0.5))


@st.composite
def ranked(draw: st.DrawFn) -> list[EncodedPair]:
    """The pairs of prompts with K scored answers; equal scores, equal texts and prompts that begin alike occur."""
    token = st.integers(3, 6)
    rule = draw(st.sampled_from(["best_each", "all"]))
    beginning = tuple(draw(st.lists(token, min_size=8, max_size=10)))
    pairs: list[EncodedPair] = []
    for number in range(draw(st.integers(1, 3))):
        answer = st.lists(token, min_size=1, max_size=3).map(lambda ids: (*ids, 2))
        answers = draw(st.lists(answer, min_size=2, max_size=4))
        scores = draw(st.lists(st.integers(0, 2), min_size=len(answers), max_size=len(answers)))
        made = PAIR_RULES[rule]([float(score) for score in scores])
        prompt = (*beginning, 10 + number)
        pairs += [EncodedPair(prompt, answers[a], answers[b], number, "t") for a, b in made if answers[a] != answers[b]]
    return draw(st.permutations(pairs))


def step(forests: Sequence[Forest], pairs: int) -> tuple[Step, Reference]:
    """Mean loss and gradients over all pairs of `forests`."""
    reference = Reference(AdapterOff(SCORER))
    reference.fill(forests)
    total = torch.zeros((), dtype=torch.float64)
    counted = 0
    for forest in forests:
        logps = pair_logps(
            leaf_logprobs(SCORER, forest), reference.known(forest), AnswerOrder.of(forest, forest.device)
        )
        losses_P = OBJECTIVE.losses(logps)
        total = total + losses_P.sum() / pairs
        counted += logps.pairs
    assert counted == pairs
    parameters = tiny.trained(MODEL)
    grads = torch.autograd.grad(total, list(parameters.values()))
    return (total.detach(), dict(zip(parameters, grads, strict=True))), reference


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ranked(), st.sampled_from([(1, None), (24, None), (10_000, None), (64, Shape(tokens=64, scored=40, leaves=30))]))
def test_losses_gradients_and_reference_keys_are_those_of_separate_leaves(
    pairs: list[EncodedPair], limits: tuple[int, Shape | None]
) -> None:
    if not pairs:
        return
    budget, shape = limits
    forests = forests_of_pairs(pairs, budget, shape=shape)
    alone = [forest for pair in pairs for forest in forests_of_pairs([pair], 10_000)]  # nothing shared between pairs
    (loss, grads), reference = step(forests, len(pairs))
    (expected, expected_grads), separate = step(alone, len(pairs))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for name, grad in expected_grads.items():  # norms work in float32 backwards; contradictory pairs cancel out
        torch.testing.assert_close(grads[name], grad, rtol=5e-6, atol=1e-7)
    assert reference._known.keys() == separate._known.keys()
    for key, token_S in separate._known.items():
        torch.testing.assert_close(reference._known[key], token_S, rtol=0, atol=1e-6)
    names = sorted(name for forest in forests for name in forest.leaf_ids)
    assert names == list(range(2 * len(pairs)))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(ranked())
def test_scores_of_pairs_are_those_of_separate_pairs(pairs: list[EncodedPair]) -> None:
    if not pairs:
        return
    found = score_pairs(SCORER, pairs)
    for index, pair in enumerate(pairs):
        alone = score_pairs(SCORER, [pair])
        torch.testing.assert_close(found.chosen_P[index], alone.chosen_P[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(found.rejected_P[index], alone.rejected_P[0], rtol=0, atol=1e-9)


def best_each(prompts: int, answers: int) -> list[EncodedPair]:
    return [
        EncodedPair((p, 5, 6), (20 + p, *range(30, 60), 2), (70 + k, *range(30, 40), 2), p, "t")
        for p in range(prompts)
        for k in range(1, answers)
    ]


def test_each_answer_is_computed_once() -> None:
    pairs = best_each(prompts=3, answers=4)
    (forest,) = forests_of_pairs(pairs, budget=10_000)
    assert len(forest) == 3 * (3 + 32 + 3 * 12)
    reference = Reference(AdapterOff(SCORER))
    reference.fill([forest])
    assert (reference.misses, reference.hits) == (3 * 4, 0)  # answers, not sides of pairs
    reference.fill(forests_of_pairs(pairs, budget=50))
    assert reference.misses == 3 * 4


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_pairs_of_a_best_answer_stay_on_one_rank(ranks: int) -> None:
    pairs = best_each(prompts=6, answers=4)
    shares = [[pairs[place] for place in places] for places in shard_pairs(pairs, ranks)]
    assert [len({pair.row for pair in share}) for share in shares] == [6 // ranks] * ranks
    assert sum(len({pair.row for pair in share}) for share in shares) == 6
    sizes = [sum(tree.size for tree in grow(bundles_of_pairs(share))) for share in shares]
    assert len(set(sizes)) == 1
