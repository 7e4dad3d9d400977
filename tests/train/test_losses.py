"""The losses' equations on numbers worked out by hand, and against TRL's formulas written down again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from preftree.config.choices import LOSS_TYPES
from preftree.train.losses import LOSSES, SMOOTHED, PairLogps
from preftree.train.metrics import NAMES, PairMeter


def logps(chosen: list[float], rejected: list[float], ref_chosen: list[float], ref_rejected: list[float]) -> PairLogps:
    """Pairs whose answers have 4 and 5 tokens."""
    policy_w, policy_l, ref_w, ref_l = torch.tensor([chosen, rejected, ref_chosen, ref_rejected], dtype=torch.float64)
    lengths = torch.full((len(chosen),), 4), torch.full((len(chosen),), 5)
    return PairLogps(policy_w.clone(), policy_l.clone(), ref_w.clone(), ref_l.clone(), *lengths)


# Log-ratios: chosen −10 − −14 = 4, rejected −20 − −15 = −5, so h = 9.
ONE = logps([-10.0], [-20.0], [-14.0], [-15.0])


def test_sigmoid_by_hand() -> None:
    (loss,) = LOSSES["sigmoid"](ONE, 0.1, 0.0)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-0.9)), abs=1e-15)  # 0.3412
    assert float(loss) == pytest.approx(0.3411538747, abs=1e-9)


def test_label_smoothing_mixes_in_the_other_label() -> None:
    (loss,) = LOSSES["sigmoid"](ONE, 0.1, 0.25)
    right, wrong = math.log(1 + math.exp(-0.9)), math.log(1 + math.exp(0.9))
    assert float(loss) == pytest.approx(0.75 * right + 0.25 * wrong, abs=1e-15)
    assert float(loss) != pytest.approx(right, abs=0.1)


def test_ipo_averages_over_tokens() -> None:
    # 4/4 − (−5)/5 = 2, and 1/(2 · 0.1) = 5. Summed log-ratios would give (9 − 5)² = 16.
    (loss,) = LOSSES["ipo"](ONE, 0.1, 0.0)
    assert float(loss) == pytest.approx((2 - 5) ** 2, abs=1e-12)


def test_hinge_by_hand() -> None:
    near, far = logps([-10.0], [-20.0], [-14.0], [-15.0]), logps([-1.0], [-20.0], [-14.0], [-15.0])
    assert float(LOSSES["hinge"](near, 0.1, 0.0)) == pytest.approx(0.1, abs=1e-12)
    assert float(LOSSES["hinge"](far, 0.1, 0.0)) == 0.0  # h = 18, β h = 1.8


def random_logps(count: int = 50) -> PairLogps:
    columns = [(-30 * torch.rand(count, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    lengths = [torch.randint(1, 30, (count,)) for _ in range(2)]
    return PairLogps(*columns, *lengths)


def trl(name: str, x: PairLogps, beta: float, smoothing: float) -> Tensor:
    """TRL's DPOTrainer: the same losses from its own order of operations."""
    if name == "ipo":  # log-ratios averaged over each answer, each with its reference
        chosen = x.chosen_P / x.chosen_length_P - x.ref_chosen_P / x.chosen_length_P
        rejected = x.rejected_P / x.rejected_length_P - x.ref_rejected_P / x.rejected_length_P
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    delta = (x.chosen_P - x.rejected_P) - (x.ref_chosen_P - x.ref_rejected_P)
    if name == "hinge":
        return (1 - beta * delta).clamp_min(0)
    sigma = torch.sigmoid(beta * delta)
    return -(1 - smoothing) * sigma.log() - smoothing * (1 - sigma).log()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_values_and_gradients_of_trls_formulas(name: str, smoothing: float) -> None:
    if smoothing and name not in SMOOTHED:
        # Settings refuse it; the function ignores it, and says so by not being in SMOOTHED.
        x = random_logps()
        assert torch.equal(LOSSES[name](x, 0.2, smoothing), LOSSES[name](x, 0.2, 0.0))
        return
    x = random_logps()
    leaves = [x.chosen_P, x.rejected_P, x.ref_chosen_P, x.ref_rejected_P]
    found, expected = LOSSES[name](x, 0.2, smoothing), trl(name, x, 0.2, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for have, want in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert float(want.abs().max()) > 0
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_check(name: str) -> None:
    x = random_logps(5)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return LOSSES[name](
            PairLogps(chosen, rejected, x.ref_chosen_P, x.ref_rejected_P, x.chosen_length_P, x.rejected_length_P),
            0.1,
            0.2 if name in SMOOTHED else 0.0,
        )

    assert torch.autograd.gradcheck(loss, (x.chosen_P, x.rejected_P))


def test_a_hopeless_pair_has_a_finite_loss() -> None:
    lost = logps([-1e5], [-1.0], [-1.0], [-1e5])
    lost.chosen_P.requires_grad_()
    loss = LOSSES["sigmoid"](lost, 0.1, 0.0)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.1 * 2 * (1e5 - 1), rel=1e-9)  # log σ, not log of σ: no infinity
    assert float(lost.chosen_P.grad) == pytest.approx(-0.1)  # type: ignore[arg-type]


def test_every_loss_can_be_asked_for() -> None:
    assert set(LOSSES) == set(LOSS_TYPES)
    assert set(LOSSES) >= SMOOTHED


def test_meter_weights_pairs_and_not_batches() -> None:
    meter = PairMeter()
    assert meter.means() == {}
    three = logps([-1.0, -2.0, -3.0], [-4.0, -4.0, -4.0], [-1.0, -1.0, -2.0], [-3.0, -4.0, -8.0])
    one = logps([-9.0], [-5.0], [-1.0], [-1.0])
    meter.add(three, torch.tensor([1.0, 2.0, 3.0]), beta=0.5)
    meter.add(one, torch.tensor([10.0]), beta=0.5)
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
    meter.add(logps([-1.0], [-2.0], [-1.0], [-2.0]), torch.tensor([0.7]), beta=0.1)
    assert meter.means()["rewards/accuracies"] == 0.0
