"""Numbers that are not finite: a step of them is skipped, three in a row end the run, and none is ever saved.

A loss or gradient with NaN or an infinity would end up in every weight at once. It is found after the gradients of all
ranks were added up, so that all of them decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from preftree.errors import RunError
from preftree.forest import Pair

#: Steps in a row that may be skipped.
PATIENCE = 3
#: Devices on which reading a number costs little. On others (lazy mode) it would end the graph in every step: there
#: only weights are looked at, before they are saved.
READ_EACH_STEP = ("cpu", "cuda")
#: No weight of an adapter or a model is anywhere near this.
HUGE = 1e4


@dataclass
class FiniteGuard:
    """Watches the steps of a run.

    Args:
        say: where a skipped step is told.
        gradients: look at gradients too; a loss scaler does that itself.
    """

    say: Callable[[str], None]
    gradients: bool = True
    in_a_row: int = field(default=0)

    def allows(self, step: int, loss: Tensor, trained: Sequence[nn.Parameter], pairs: Sequence[Pair]) -> bool:
        """May this step change the weights? If not, its gradients are dropped.

        Args:
            step: number of the step, for the message.
            loss: its mean loss over all ranks.
            pairs: of the step.

        Raises:
            RunError: `PATIENCE` steps in a row were not finite; with a diagnosis.
        """
        if loss.device.type not in READ_EACH_STEP:
            return True
        bad = _not_finite(loss, trained if self.gradients else ())
        if bad is None:
            self.in_a_row = 0
            return True
        for parameter in trained:
            parameter.grad = None
        self.in_a_row += 1
        rows = ", ".join(dict.fromkeys(row_of(pair) for pair in pairs))
        self.say(f"skipped    step {step}: its {bad} is not finite; the weights are unchanged. Its pairs: {rows}")
        if self.in_a_row >= PATIENCE:
            raise RunError(_diagnosis(step, bad, trained))
        return False


def _not_finite(loss: Tensor, trained: Iterable[nn.Parameter]) -> str | None:
    """What is not finite, in words; the host waits for the device once."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    checks = [torch.isfinite(loss).all()]
    if gradients:
        checks.append(torch.isfinite(torch.stack([norm.to(loss.device) for norm in _norms(gradients)])).all())
    finite = torch.stack(checks).tolist()
    return "loss" if not finite[0] else "gradient" if not all(finite) else None


def _norms(gradients: list[Tensor]) -> Sequence[Tensor]:
    """The maximum norm of each: NaN and infinities stay what they are, and no large finite sum becomes one.

    On a CPU the extremes are found twenty times as fast as that norm.
    """
    if all(gradient.device.type == "cpu" and gradient.numel() for gradient in gradients):
        return [torch.stack(gradient.aminmax()).abs().amax().float() for gradient in gradients]
    return [norm.float() for norm in torch._foreach_norm(gradients, float("inf"))]


def row_of(pair: Pair) -> str:
    """Where a pair comes from, in words."""
    row, source = getattr(pair, "row", None), getattr(pair, "source", "")
    return "unknown" if row is None else f"{source} row {row}".strip()


def _diagnosis(step: int, bad: str, trained: Sequence[nn.Parameter]) -> str:
    largest = max((float(norm) for norm in _norms([weight.detach() for weight in trained])), default=0.0)
    if not largest < HUGE:
        why = f"an update was too large, for the largest trained weight is {largest:.3g}"
        what = "Lower --learning_rate, or set --max_grad_norm 1 and some --warmup_steps, and start anew"
    else:
        why = "the trained weights look sound, so single pairs or the precision are the cause"
        what = "Look at the rows named above, train in --torch_dtype float32, or lower --learning_rate"
    return (
        f"Training has diverged: at step {step} the {bad} was not finite for the {PATIENCE}rd time in a row; {why}. "
        f"None of these steps was saved, and the checkpoints before them are unchanged. {what}."
    )


def weights_are_finite(weights: Iterable[Tensor]) -> bool:
    """Is every one of these numbers finite?"""
    return all(bool(torch.isfinite(norm)) for norm in _norms([weight.detach() for weight in weights]) or [])


def refuse_to_save(trained: Sequence[Tensor], place: str) -> None:
    """Raise RunError rather than write weights that are not finite over good ones."""
    if trained and not weights_are_finite(trained):
        raise RunError(
            f"The trained weights are not finite (NaN or infinity), so they were not written to {place}; what is there "
            "is unchanged. Lower --learning_rate and go on from an earlier checkpoint."
        )
