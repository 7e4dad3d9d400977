"""Out of memory is an event: the step is computed again in smaller forests, with the same gradients."""

from __future__ import annotations

import mmap
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from preftree.errors import RunError
from preftree.forest import Forest
from preftree.hardware.limits import allocations_within
from preftree.model.score import LeafLogprobs, Scorer
from preftree.train.trainer import DPOTrainer
from tests.support.training import PAIRS, make_model, make_trainer, one_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


class Allocation:
    """Every pass over more than `tokens` tokens fails, in the words of the device."""

    def __init__(self, patch: pytest.MonkeyPatch, tokens: int, error: Exception, *, backward: bool = False) -> None:
        self.tokens, self.failed = tokens, 0
        original = Scorer.__call__

        def fail(size: int) -> None:
            if size > self.tokens:
                self.failed += 1
                raise error

        def score(scorer: Scorer, forest: Forest, *more: Any) -> LeafLogprobs:
            if not backward:
                fail(len(forest))
                return original(scorer, forest, *more)
            scores = original(scorer, forest, *more)
            if scores.token_S.requires_grad:
                scores.token_S.register_hook(lambda gradient: fail(len(forest)))
            return scores

        patch.setattr(Scorer, "__call__", score)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "cpu", "python"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_step_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, backward: bool
) -> None:
    expected_loss, expected = one_step(make_trainer(make_model(), tmp_path / "a", budget=64), PAIRS)
    trainer = make_trainer(make_model(), tmp_path / "b", budget=64)
    memory = Allocation(monkeypatch, tokens=40, error=error, backward=backward)
    loss, found = one_step(trainer, PAIRS)
    assert memory.failed
    assert trainer.step.budget <= 40
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    for name, gradient in expected.items():
        # Rounding of the float32 that attention computes in; a pair left out or counted twice changes whole digits.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of writable memory")
def test_a_limit_is_kept_by_smaller_forests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real memory that the kernel refuses, 2 MiB per token; torch itself may reuse what other tests freed."""
    expected_loss, expected = one_step(make_trainer(make_model(), tmp_path / "a", budget=64), PAIRS)
    trainer, original = make_trainer(make_model(), tmp_path / "b", budget=64), Scorer.__call__

    def score(scorer: Scorer, forest: Forest, *more: Any) -> LeafLogprobs:
        try:
            held = mmap.mmap(-1, len(forest) * 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory") from error
        with held:
            return original(scorer, forest, *more)

    monkeypatch.setattr(Scorer, "__call__", score)
    resident = psutil.Process().memory_info().rss
    trainer.step.within = partial(allocations_within, resident + 80 * 2**20)
    loss, found = one_step(trainer, PAIRS)
    assert trainer.step.budget <= 40
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)
    trainer.step.within = partial(allocations_within, resident)
    with pytest.raises(RunError, match=r"single pair of \d+ tokens"):
        one_step(trainer, PAIRS)


def test_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_trainer(make_model(), tmp_path / "a", evaluated=PAIRS).evaluate()
    trainer = make_trainer(make_model(), tmp_path / "b", evaluated=PAIRS)
    memory = Allocation(monkeypatch, tokens=40, error=ERRORS[0])
    found = trainer.evaluate()
    assert memory.failed
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[name] == pytest.approx(expected[name], abs=1e-9)


def test_a_pair_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_model(), tmp_path)
    with torch.no_grad():
        trainer.step.plan(PAIRS)  # the reference knows them
    Allocation(monkeypatch, tokens=3, error=ERRORS[0])
    with pytest.raises(RunError, match=r"single pair of \d+ tokens \(test row \d\).*--max_length"):
        one_step(trainer, PAIRS)


def test_an_answer_that_does_not_fit_the_reference_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_model(), tmp_path)
    Allocation(monkeypatch, tokens=3, error=ERRORS[0])
    with pytest.raises(RunError, match=r"reference pass with a single answer of \d+ tokens"):
        one_step(trainer, PAIRS)


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: DPOTrainer = make_trainer(make_model(), tmp_path)
    Allocation(monkeypatch, tokens=3, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        one_step(trainer, PAIRS)
