"""Every loss against its paper's equation, written down again in plain numbers, with its gradients, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from preftree.config.dpo import (
    DIVERGENCE_LOSSES,
    F_DIVERGENCES,
    LIST_LOSSES,
    LOSS_TYPES,
    SMOOTHED_LOSSES,
    SORTING_LOSSES,
)
from preftree.train.losses import DIVERGENCES, LOSSES, LossSettings, PairLogps, join
from preftree.train.metrics import NAMES, PairMeter
from preftree.train.objective import Objective

SETTINGS = LossSettings(beta=0.2, simpo_gamma=0.7, cpo_alpha=0.6, dpop_lambda=5.0, rpo_alpha=0.8, rdpo_alpha=0.03)


def logps(chosen: list[float], rejected: list[float], ref_chosen: list[float], ref_rejected: list[float]) -> PairLogps:
    """Pairs whose answers have 4 and 5 tokens."""
    policy_w, policy_l, ref_w, ref_l = torch.tensor([chosen, rejected, ref_chosen, ref_rejected], dtype=torch.float64)
    lengths = torch.full((len(chosen),), 4), torch.full((len(chosen),), 5)
    return PairLogps(policy_w.clone(), policy_l.clone(), ref_w.clone(), ref_l.clone(), *lengths)


def values(name: str, x: PairLogps, settings: LossSettings = SETTINGS) -> Tensor:
    return LOSSES[name].values(x, settings)


# Log-ratios: chosen −10 − −14 = 4, rejected −20 − −15 = −5, so h = 9; β h = 1.8.
ONE = logps([-10.0], [-20.0], [-14.0], [-15.0])


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


#: Each loss of `ONE` under `SETTINGS`, by hand.
BY_HAND: dict[str, Callable[[], float]] = {
    "sigmoid": lambda: -math.log(sigma(1.8)),
    "hinge": lambda: max(0, 1 - 1.8),
    "ipo": lambda: (4 / 4 - -5 / 5 - 2.5) ** 2,
    "nca_pair": lambda: -math.log(sigma(0.8)) - math.log(sigma(-0.8)) / 2 - math.log(sigma(1.0)) / 2,
    "robust": lambda: -math.log(sigma(1.8)),
    "bco_pair": lambda: -math.log(sigma(0.8)) - math.log(sigma(1.0)),
    "sppo_hard": lambda: (4 - 2.5) ** 2 + (-5 + 2.5) ** 2,
    "aot": lambda: -math.log(sigma(0.2 * (10 - 1))),
    "aot_unpaired": lambda: -math.log(sigma(0.2 * (4 + 5))),
    "apo_zero": lambda: 1 - sigma(0.8) + sigma(-1.0),
    "apo_down": lambda: sigma(0.8) + 1 - sigma(1.8),
    "discopop": lambda: -math.log(sigma(1.8)) * (1 - sigma(36)) + math.exp(-1.8) * sigma(36),
    "sft": lambda: 10 / 4,
    "sigmoid_norm": lambda: -math.log(sigma(0.2 * (1 + 1))),
    "dpop": lambda: -math.log(sigma(1.8)),  # the chosen answer is likelier than under the reference
    "rpo": lambda: -math.log(sigma(1.8)) + 0.8 * 10 / 4,
    "rdpo": lambda: -math.log(sigma(1.8 + 0.03 * (4 - 5))),
    "simpo": lambda: -math.log(sigma(0.2 * (-2.5 + 4) - 0.7)),
    "cpo": lambda: -math.log(sigma(0.2 * 10)) + 0.6 * 2.5,
    "listwise": lambda: -math.log(sigma(1.8)),
    "orpo": lambda: 2.5 - 0.2 * math.log(sigma(-2.5 + 4 - math.log((1 - math.exp(-2.5)) / (1 - math.exp(-4))))),
}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "exo_pair"])
def test_by_hand(name: str) -> None:
    assert float(values(name, ONE)) == pytest.approx(BY_HAND[name](), rel=1e-12, abs=1e-12)


def test_exo_is_a_divergence_from_smoothed_labels() -> None:
    settings = replace(SETTINGS, label_smoothing=0.1)
    p, q = (sigma(1.8), sigma(-1.8)), (0.9, 0.1)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(values("exo_pair", ONE, settings)) == pytest.approx(expected, rel=1e-12)


def test_dpop_holds_the_chosen_answer_up() -> None:
    sunk = logps([-16.0], [-30.0], [-14.0], [-15.0])  # chosen −2, rejected −15
    expected = -math.log(sigma(0.2 * (13 - 5 * 2)))
    assert float(values("dpop", sunk)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "aot", "aot_unpaired", "rpo", "rdpo", "cpo"])
def test_label_smoothing_mixes_in_the_other_label(name: str) -> None:
    """(1 − ε) of the loss and ε of that of the swapped pair, beside any next-token term."""
    settings = replace(SETTINGS, label_smoothing=0.25)
    terms = {"rpo": 0.8 * 2.5, "cpo": 0.6 * 2.5}
    scaled = {"rdpo": 1.8 - 0.03, "cpo": 2.0}.get(name, 1.8)
    expected = -0.75 * math.log(sigma(scaled)) - 0.25 * math.log(sigma(-scaled)) + terms.get(name, 0.0)
    assert float(values(name, ONE, settings)) == pytest.approx(expected, rel=1e-12)


def test_robust_takes_the_noise_out() -> None:
    settings = replace(SETTINGS, label_smoothing=0.25)
    expected = (-0.75 * math.log(sigma(1.8)) + 0.25 * math.log(sigma(-1.8))) / 0.5
    assert float(values("robust", ONE, settings)) == pytest.approx(expected, rel=1e-12)


def test_aot_compares_sorted_margins() -> None:
    x = logps([-10.0, -20.0], [-15.0, -22.0], [-11.0, -12.0], [-12.0, -20.0])
    # Margins of the policy 5, 2 and of the reference 1, 8: sorted 2, 5 against 1, 8.
    assert values("aot", x).tolist() == pytest.approx([-math.log(sigma(0.2 * d)) for d in (1, -3)])
    # Log-ratios 1, −8 of the chosen and −3, −2 of the rejected: sorted −8, 1 against −3, −2.
    assert values("aot_unpaired", x).tolist() == pytest.approx([-math.log(sigma(0.2 * d)) for d in (-5, 3)])


@pytest.mark.parametrize(
    ("name", "u_prime"),
    [
        ("reverse_kl", lambda u: math.log(u)),
        ("forward_kl", lambda u: 1 - 1 / u),
        ("js_divergence", lambda u: math.log(2 * u / (1 + u))),
        ("alpha_divergence", lambda u: (u ** (0.3 - 1) - 1) / (0.3 - 1)),
    ],
)
def test_f_divergences(name: str, u_prime: Callable[[float], float]) -> None:
    settings = replace(SETTINGS, f_divergence_type=name, f_alpha_divergence_coef=0.3)
    h = u_prime(math.exp(4)) - u_prime(math.exp(-5))
    assert float(values("sigmoid", ONE, settings)) == pytest.approx(-math.log(sigma(0.2 * h)), rel=1e-12)
    h = u_prime(math.exp(4)) / 4 - u_prime(math.exp(-5)) / 5
    assert float(values("ipo", ONE, settings)) == pytest.approx((h - 2.5) ** 2, rel=1e-12)


def test_the_alpha_divergence_has_the_reverse_kl_as_its_limit() -> None:
    settings = replace(SETTINGS, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert float(values("sigmoid", ONE, settings)) == pytest.approx(BY_HAND["sigmoid"](), rel=1e-12)


def random_logps(count: int = 5) -> PairLogps:
    columns = [(-30 * torch.rand(count, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    lengths = [torch.randint(1, 30, (count,)) for _ in range(2)]
    return PairLogps(*columns, *lengths)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_check(name: str) -> None:
    x = random_logps()
    settings = replace(SETTINGS, label_smoothing=0.2 if LOSSES[name].smoothing else 0.0)
    parts = (x.ref_chosen_P, x.ref_rejected_P, x.chosen_length_P, x.rejected_length_P)
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: values(name, PairLogps(chosen, rejected, *parts), settings), (x.chosen_P, x.rejected_P)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_table_says_of_a_loss_is_true(name: str) -> None:
    loss, x = LOSSES[name], random_logps(6)
    settings = replace(SETTINGS, label_smoothing=0.2 if name == "exo_pair" else 0.0)
    # A reference that says something else changes every loss that has one, and no other.
    other = replace(x, ref_chosen_P=x.ref_chosen_P + 3, ref_rejected_P=x.ref_rejected_P - 4)
    assert torch.equal(values(name, x, settings), values(name, other, settings)) == (not loss.reference)
    # A loss that couples pairs is not that of its pairs one by one.
    alone = torch.cat([values(name, replace_pairs(x, [i]), settings) for i in range(6)])
    if name != "sft":  # its mean length is the step's
        assert torch.allclose(values(name, x, settings), alone) == (not loss.coupled)
    smoothed = replace(settings, label_smoothing=0.3)
    assert torch.equal(values(name, x, settings), values(name, x, smoothed)) == (not loss.smoothing)


def replace_pairs(x: PairLogps, places: list[int]) -> PairLogps:
    names = ("chosen_P", "rejected_P", "ref_chosen_P", "ref_rejected_P", "chosen_length_P", "rejected_length_P")
    return PairLogps(**{name: getattr(x, name)[places] for name in names})


def test_the_settings_know_the_same_losses() -> None:
    assert tuple(LOSSES) == LOSS_TYPES
    assert {name for name, loss in LOSSES.items() if loss.divergence} == DIVERGENCE_LOSSES
    assert {name for name, loss in LOSSES.items() if loss.smoothing} == SMOOTHED_LOSSES
    assert {name for name, loss in LOSSES.items() if loss.coupled} == SORTING_LOSSES
    assert {name for name, loss in LOSSES.items() if loss.lists} == LIST_LOSSES
    assert tuple(DIVERGENCES) == F_DIVERGENCES


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_reference_free_losses_are_trls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own functions of log-probs; in CPO and ORPO without the next-token term, which it adds elsewhere."""
    pytest.importorskip("trl", reason="TRL is not installed (the test extra has it)")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    x = random_logps(20)
    told = {"beta": 0.2, "simpo_gamma": 0.7, "label_smoothing": 0.0, "alpha": 0.0}
    accelerator = SimpleNamespace(device="cpu")
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        self = SimpleNamespace(beta=0.2, accelerator=accelerator)
        ratio = ORPOTrainer.odds_ratio_loss(self, x.chosen_mean_P, x.rejected_mean_P)[0].double()
        expected = -x.chosen_mean_P - ratio
    else:
        from trl.experimental.cpo import CPOTrainer

        self = SimpleNamespace(**told, loss_type="simpo" if name == "simpo" else "sigmoid", accelerator=accelerator)
        sides = (x.chosen_mean_P, x.rejected_mean_P) if name == "simpo" else (x.chosen_P, x.rejected_P)
        expected = CPOTrainer.cpo_loss(self, *sides)[0]
        if name == "cpo":
            expected = expected - 0.6 * x.chosen_mean_P
    torch.testing.assert_close(values(name, x), expected, rtol=1e-5, atol=1e-6)


def test_a_hopeless_pair_has_a_finite_loss() -> None:
    lost = logps([-1e5], [-1.0], [-1.0], [-1e5])
    lost.chosen_P.requires_grad_()
    loss = values("sigmoid", lost, LossSettings(beta=0.1))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.1 * 2 * (1e5 - 1), rel=1e-9)  # log σ, not log of σ: no infinity
    assert float(lost.chosen_P.grad) == pytest.approx(-0.1)  # type: ignore[arg-type]


def test_a_certain_answer_has_a_finite_odds_ratio() -> None:
    certain = logps([0.0], [-1.0], [0.0], [0.0])
    certain.chosen_P.requires_grad_()
    loss = values("orpo", certain)
    loss.sum().backward()
    assert math.isfinite(float(loss.detach()))
    assert math.isfinite(float(certain.chosen_P.grad))  # type: ignore[arg-type]


# --- Mixtures ---


def test_a_mixture_is_the_weighted_sum() -> None:
    x = random_logps(7)
    mixed = Objective(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.5), SETTINGS)
    expected = 0.8 * values("sigmoid", x) + 0.2 * values("bco_pair", x) + 1.5 * values("sft", x)
    torch.testing.assert_close(mixed.losses(x), expected)
    assert mixed.needs_reference
    assert not mixed.coupled
    assert not Objective(("sft", "simpo")).needs_reference
    assert Objective(("sigmoid", "aot")).coupled


def test_wpo_weighs_each_pair() -> None:
    x = random_logps(3)
    weights = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    found = Objective("sigmoid", settings=SETTINGS).losses(replace(x, importance_P=weights))
    torch.testing.assert_close(found, weights * values("sigmoid", x))


def test_joined_pairs_lose_their_padding() -> None:
    padded = replace(random_logps(4), weight_P=torch.tensor([1.0, 1, 1, 0]), real=3)
    joined = join([padded, replace(random_logps(2), weight_P=torch.tensor([1.0, 0]), real=1)])
    assert joined.pairs == 4
    assert torch.equal(joined.chosen_P[:3], padded.chosen_P[:3])
    assert joined.weight_P is None


# --- Metrics ---


def test_meter_weights_pairs_and_not_batches() -> None:
    meter, half = PairMeter(), Objective(settings=LossSettings(beta=0.5))
    assert meter.means() == {}
    three = logps([-1.0, -2.0, -3.0], [-4.0, -4.0, -4.0], [-1.0, -1.0, -2.0], [-3.0, -4.0, -8.0])
    one = logps([-9.0], [-5.0], [-1.0], [-1.0])
    meter.add(three, torch.tensor([1.0, 2.0, 3.0]), half)
    meter.add(one, torch.tensor([10.0]), half)
    means = meter.means()
    assert tuple(means) == NAMES
    assert meter.pairs == 4
    # Log-ratios: chosen 0, −1, −1, −8; rejected −1, 0, 4, −4. Right: the first only.
    assert means == pytest.approx(
        {
            "loss": 16 / 4,  # a mean of batch means would be 6
            "rewards/chosen": 0.5 * -10 / 4,
            "rewards/rejected": 0.5 * -1 / 4,
            "rewards/accuracies": 1 / 4,
            "rewards/margins": 0.5 * -9 / 4,
            "logps/chosen": -15 / 4,
            "logps/rejected": -17 / 4,
        }
    )


def test_a_tie_is_not_right() -> None:
    """At the start every margin is 0; an accuracy above 0 there would be made of nothing."""
    meter = PairMeter()
    meter.add(logps([-1.0], [-2.0], [-1.0], [-2.0]), torch.tensor([0.7]), Objective())
    assert meter.means()["rewards/accuracies"] == 0.0
