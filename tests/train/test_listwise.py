"""Listwise DPO: all K ranked answers of a prompt in one tree, against single sequences and the paper's equation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from preftree import DPOConfig, load_pairs
from preftree.cli import main_train
from preftree.config.train import parse_settings
from preftree.data.encode import EncodedPair
from preftree.errors import SettingsError
from preftree.forest import Shape
from preftree.train.identity import data_fact
from preftree.train.losses import LOSSES, LossSettings, PairLogps, join
from preftree.train.metrics import PairMeter
from preftree.train.objective import Objective
from tests.support import tiny
from tests.support.command import command, history, losses, ranked_rows, write_rows
from tests.support.training import PAIRS, Step, make_model, make_trainer, one_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")

SETTINGS = LossSettings(beta=0.3)


def listed(row: int, prompt: tuple[int, ...], answers: dict[tuple[int, ...], int]) -> EncodedPair:
    """A ranked list, its answers given with their ranks, best first."""
    (chosen, first), *between, (rejected, last) = answers.items()
    ranks = (first, last, *(rank for _, rank in between))
    return EncodedPair(prompt, chosen, rejected, row, "test", tuple(answer for answer, _ in between), ranks)


#: K from 2 to 5, ties at the top, in the middle and at the end, a prompt that several lists have.
LISTS = [
    listed(0, (*range(3, 15), 20), {(30, 31, 2): 1, (40, 2): 2, (41, 42, 2): 3, (43,): 4}),
    listed(1, (*range(3, 15), 20), {(33, 2): 1, (44, 45, 46, 2): 1, (47, 2): 2}),
    PAIRS[3],
    listed(3, (50, 51), {(30, 2): 1, (52, 53, 2): 2, (54, 2): 2, (55, 56, 57, 2): 3, (58,): 3}),
    listed(4, (60, 61, 62), {(36, 37): 1, (38, 2): 2, (39, 2): 2}),
]


def table(rows: list[list[float]], ranks: list[list[int]], reference: list[list[float]] | None = None) -> PairLogps:
    policy_PK = torch.tensor(rows, dtype=torch.float64)
    reference_PK = torch.zeros_like(policy_PK) if reference is None else torch.tensor(reference, dtype=torch.float64)
    ends = (policy_PK[:, 0], policy_PK[:, 1], reference_PK[:, 0], reference_PK[:, 1])
    lengths = [torch.ones(len(rows), dtype=torch.long)] * 2
    return PairLogps(*ends, *lengths, policy_PK=policy_PK, reference_PK=reference_PK, rank_PK=torch.tensor(ranks))


def listwise(logps: PairLogps, settings: LossSettings = SETTINGS) -> Tensor:
    return LOSSES["listwise"].values(logps, settings)


# --- The function ---


def test_equation_20_by_hand() -> None:
    x = table([[-10.0, -20.0, -12.0, -7.0]], [[1, 4, 2, 3]], [[-11.0, -18.0, -12.5, -9.0]])
    s = [0.3 * ratio for ratio in (1.0, -2.0, 0.5, 2.0)]
    order = [s[0], s[2], s[3], s[1]]  # best first
    expected = -sum(math.log(math.exp(order[k]) / sum(map(math.exp, order[k:]))) for k in range(4))
    assert float(listwise(x)) == pytest.approx(expected, rel=1e-12)


def test_probabilities_of_all_rankings_add_up_to_1() -> None:
    x = table([[-1.0, -4.0, -2.5]] * 6, [list(ranks) for ranks in itertools.permutations((1, 2, 3))])
    assert float((-listwise(x)).exp().sum()) == pytest.approx(1.0, rel=1e-12)


def test_equal_ranks_are_not_compared() -> None:
    """Each term is the probability of an answer to be the first among itself and those that are worse."""
    x = table([[-1.0, -4.0, -2.0, -3.0]], [[1, 3, 1, 3]])
    s = [0.3 * p for p in (-1.0, -4.0, -2.0, -3.0)]
    worse = math.exp(s[1]) + math.exp(s[3])
    expected = -sum(math.log(math.exp(s[i]) / (math.exp(s[i]) + worse)) for i in (0, 2))
    assert float(listwise(x)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence"])
def test_two_answers_are_sigmoid_to_the_bit(divergence: str) -> None:
    torch.manual_seed(0)
    settings = replace(SETTINGS, f_divergence_type=divergence)
    columns = [(-40 * torch.rand(50)).requires_grad_() for _ in range(4)]
    pairs = PairLogps(*columns, *[torch.ones(50)] * 2)
    wide = replace(  # the same pairs beside a list of four answers
        pairs,
        policy_PK=torch.stack([columns[0], columns[1], columns[0], columns[0]], 1),
        reference_PK=torch.stack([columns[2], columns[3], columns[2], columns[2]], 1),
        rank_PK=torch.tensor([[1, 2, 0, 0]]).expand(50, 4),
    )
    expected = LOSSES["sigmoid"].values(pairs, settings)
    expected_grads = torch.autograd.grad(expected.sum(), columns[:2])
    for x in (pairs, wide):
        found = listwise(x, settings)
        assert torch.equal(found, expected)
        for grad, wanted in zip(torch.autograd.grad(found.sum(), columns[:2]), expected_grads, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=0)


def test_gradient_check_with_ties_and_absent_answers() -> None:
    ranks = torch.tensor([[1, 3, 2, 2], [1, 2, 0, 0], [1, 2, 1, 0]])
    reference_PK = -5 * torch.rand(3, 4, dtype=torch.float64)
    base = table([[0.0] * 4] * 3, ranks.tolist())

    def values(policy_PK: Tensor) -> Tensor:
        return listwise(replace(base, policy_PK=policy_PK, reference_PK=reference_PK))

    policy_PK = (-5 * torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(values, (policy_PK,))
    values(policy_PK).sum().backward()
    assert policy_PK.grad is not None
    assert policy_PK.grad[1, 2:].tolist() == [0.0, 0.0]
    assert policy_PK.grad[2, 3] == 0


def test_a_hopeless_list_has_a_finite_loss() -> None:
    x = table([[-1e5, -1.0, -2e5]], [[1, 3, 2]])
    x.policy_PK.requires_grad_()  # type: ignore[union-attr]
    loss = listwise(x)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.3 * (1e5 - 1 + 2e5 - 1))
    assert x.policy_PK.grad.isfinite().all()  # type: ignore[union-attr]


# --- A step ---


def by_hand(model: torch.nn.Module, pairs: list[EncodedPair], beta: float = 0.1) -> Step:
    """Loss and gradients with every answer as a sequence of its own, and the equation as it is written."""

    def log_ratios(pair: EncodedPair) -> Tensor:
        return torch.stack([logp(pair.prompt_ids, answer) for answer in pair.answers])

    def logp(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()

    total: Any = 0
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
            reference_K = log_ratios(pair)
        score_K = beta * (log_ratios(pair) - reference_K)
        for score, rank in zip(score_K, pair.ranks, strict=True):
            worse = [other for other, its in zip(score_K, pair.ranks, strict=True) if its > rank]
            total = total - (score - torch.logsumexp(torch.stack([score, *worse]), 0))
    loss = total / len(pairs)
    parameters = tiny.trained(model)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_step_is_that_of_single_sequences(tmp_path: Path, budget: int) -> None:
    trainer = make_trainer(make_model(), tmp_path, LISTS, budget=budget, loss_type="listwise")
    found, expected = one_step(trainer, LISTS), by_hand(make_model(), LISTS)
    assert found[0] == pytest.approx(expected[0], abs=2e-6)
    assert tiny.relative_error(found[1], expected[1]) < 5e-6
    assert trainer.speed.forests == {1: 5, 40: 2, 10_000: 1}[budget]
    assert trainer.speed.pairs == 5
    assert trainer.speed.tree_tokens < trainer.speed.unrolled_tokens


def test_the_start_is_the_log_of_the_number_of_rankings(tmp_path: Path) -> None:
    """Policy and reference are one, so that every ranking of four answers has the probability 1 / 4!."""
    loss, _ = one_step(make_trainer(make_model(trained=False), tmp_path, LISTS, loss_type="listwise"), LISTS[:1])
    assert loss == pytest.approx(math.log(24), abs=1e-6)


def test_fixed_shapes_change_nothing(tmp_path: Path) -> None:
    padded = make_trainer(make_model(), tmp_path, LISTS, budget=64, loss_type="listwise")
    padded.step.shape = Shape(tokens=64, scored=40, leaves=20, answers=5)
    found = one_step(padded, LISTS)
    expected = one_step(make_trainer(make_model(), tmp_path, LISTS, loss_type="listwise"), LISTS)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert tiny.relative_error(found[1], expected[1]) < 5e-6


def test_pad_max_has_room_for_the_largest_list(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, LISTS, pad_max=True, attention="dense", loss_type="listwise")
    assert trainer.step.shape is not None
    assert trainer.step.shape.answers == 5
    plain = make_trainer(make_model(), tmp_path, LISTS, loss_type="listwise")
    assert one_step(trainer, LISTS)[0] == pytest.approx(one_step(plain, LISTS)[0], abs=1e-6)


def test_a_mixture_with_losses_of_pairs_and_of_the_step(tmp_path: Path) -> None:
    """Best and worst answers are what the others see; a loss that sorts the step takes two passes."""
    kinds = ["listwise", "aot", "sft"]
    whole = make_trainer(make_model(), tmp_path, LISTS, budget=10_000, loss_type=kinds, loss_weights=[1.0, 0.5, 0.1])
    cut = make_trainer(make_model(), tmp_path, LISTS, budget=20, loss_type=kinds, loss_weights=[1.0, 0.5, 0.1])
    expected, found = one_step(whole, LISTS), one_step(cut, LISTS)
    assert cut.speed.forests > 2
    assert found[0] == pytest.approx(expected[0], abs=2e-6)
    assert tiny.relative_error(found[1], expected[1]) < 5e-6
    alone = one_step(make_trainer(make_model(), tmp_path, LISTS, loss_type="listwise"), LISTS)[0]
    assert expected[0] > alone + 0.1


def test_other_losses_compute_best_and_worst_alone(tmp_path: Path) -> None:
    ends = [replace(pair, others=(), ranks=(1, 2)) for pair in LISTS]
    lists, pairs = make_trainer(make_model(), tmp_path, LISTS), make_trainer(make_model(), tmp_path, ends)
    assert one_step(lists, LISTS)[0] == one_step(pairs, ends)[0]
    assert lists.speed.tree_tokens == pairs.speed.tree_tokens


def test_share_of_answers_in_order() -> None:
    meter, objective = PairMeter(), Objective("listwise")
    # Of six comparisons of the first list five are right; of the second one's two (its others tie) one.
    x = table([[4.0, 1.0, 2.0, 3.0], [2.0, 3.0, 1.0, 9.0]], [[1, 4, 2, 3], [1, 2, 2, 0]])
    meter.add(x, torch.zeros(2), objective)
    assert meter.means()["rewards/rank_accuracies"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    plain = PairMeter()
    plain.add(replace(x, policy_PK=None, reference_PK=None, rank_PK=None), torch.zeros(2), Objective())
    assert "rewards/rank_accuracies" not in plain.means()


def test_tables_of_several_forests_are_joined() -> None:
    x = table([[4.0, 1.0, 2.0], [2.0, 3.0, 1.0]], [[1, 3, 2], [1, 2, 0]])
    joined = join([replace(x, real=1, weight_P=torch.tensor([1.0, 0.0])), x])
    assert joined.policy_PK is not None
    assert joined.policy_PK.tolist() == [[4.0, 1.0, 2.0], [4.0, 1.0, 2.0], [2.0, 3.0, 1.0]]


def test_other_answers_and_ranks_are_part_of_what_a_run_is() -> None:
    facts = {
        data_fact(LISTS),
        data_fact([replace(LISTS[0], others=LISTS[0].others[::-1]), *LISTS[1:]]),
        data_fact([replace(LISTS[0], ranks=(1, 3, 2, 2)), *LISTS[1:]]),
    }
    assert len(facts) == 3


# --- From rows to weights ---


def test_the_command_trains_on_lists_and_goes_on_to_the_same_bits(inputs: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "dataset_name": write_rows(tmp_path / "ranked.jsonl", ranked_rows()),
        "loss_type": "listwise",
    }
    flags |= {"save_steps": 2, "save_total_limit": 3}
    assert main_train(command(inputs, tmp_path / "A", max_steps=4, **flags)) == 0
    record = history(tmp_path / "A")[-1]
    assert 0 <= record["eval_rewards/rank_accuracies"] <= 1
    assert losses(tmp_path / "A")[0] > math.log(2)  # more than two answers
    for name in ("checkpoint-4", "run"):
        assert (tmp_path / "A" / name).exists()
    # The same run, stopped after two steps.
    import shutil

    shutil.copytree(tmp_path / "A", tmp_path / "B")
    shutil.rmtree(tmp_path / "B" / "checkpoint-4")
    again = command(inputs, tmp_path / "B", max_steps=4, resume_from_checkpoint="true", **flags)
    assert main_train(again) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "A" / name).read_bytes() == (tmp_path / "B" / name).read_bytes()
    assert losses(tmp_path / "A") == losses(tmp_path / "B")


def test_a_script_trains_on_rows_and_on_loaded_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))
    from tests.train.test_api import losses as losses_of
    from tests.train.test_api import trainer

    file = write_rows(tmp_path / "ranked.jsonl", ranked_rows())
    from_rows = trainer(tmp_path, data=ranked_rows(), loss_type="listwise")
    assert [len(pair.answers) for pair in from_rows.train_dataset.pairs] == [2 + i % 4 for i in range(10)]
    from_rows.train()
    from_file = trainer(tmp_path, data=load_pairs(str(file), pair_rule="list"), loss_type="listwise")
    from_file.train()
    assert losses_of(from_rows) == losses_of(from_file)
    assert losses_of(from_rows)[0] != pytest.approx(math.log(2), abs=0.1)


def test_answers_that_are_empty_or_repeated_leave_a_list(tmp_path: Path) -> None:
    from tests.train.test_api import trainer

    made = trainer(
        tmp_path,
        data=[
            {"prompt": "w10", "responses": ["", "w11", "w12", "w11", "w13"], "ranks": [1, 2, 3, 4, 4]},
            {"prompt": "w10", "responses": ["w11 w12", "w11 w13", "w14"], "ranks": [1, 2, 2]},
            {"prompt": "w10", "responses": ["w11", "w11", ""], "ranks": [1, 2, 3]},
        ],
        loss_type="listwise",
        max_length=5,  # four of the prompt, one of an answer
    )
    first, second = made.train_dataset.pairs
    assert (first.answers, first.ranks) == (((11,), (13,), (12,)), (2, 4, 3))
    assert (second.answers, second.ranks) == (((11,), (14,)), (1, 2))


def test_margins_make_ties(tmp_path: Path) -> None:
    row = {"prompt": "a", "responses": ["b", "c", "d", "e"], "scores": [9.0, 8.6, 8.4, 2.0]}
    (pair,) = load_pairs(str(write_rows(tmp_path / "r.jsonl", [row])), pair_rule="list", min_margin=0.5)
    assert [answer.content for answer in pair.answers] == ["b", "e", "c", "d"]
    assert pair.ranks == (1, 3, 1, 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"loss_type": "listwise", "pair_rule": "all"}, "leave --pair_rule out"),
        ({"pair_rule": "list"}, "only --loss_type listwise compares"),
        ({"loss_type": "listwise", "ld_alpha": 0.5}, "defined for two answers"),
        ({"loss_type": "listwise", "use_weighting": "true"}, "defined for two answers"),
        ({"loss_type": "listwise", "label_smoothing": 0.1}, "no meaning for --loss_type listwise"),
    ],
)
def test_contradictions(tmp_path: Path, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_settings(command(tmp_path, tmp_path / "out", **flags))


def test_the_rule_follows_the_loss(tmp_path: Path) -> None:
    assert parse_settings(command(tmp_path, tmp_path / "out")).data.pair_rule == "best_worst"
    asked = parse_settings(command(tmp_path, tmp_path / "out", loss_type="listwise sigmoid"))
    assert asked.data.pair_rule == "list"
    assert DPOConfig(str(tmp_path), loss_type=["sigmoid", "listwise"], use_cpu=True).ranks_lists
