"""`--pad_max`: one sequence of operations and shapes for all forests of a run, and the same numbers as without it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from preftree.data.encode import EncodedPair
from preftree.forest import Bundle, Forest, Shape, forests_of_pairs, pad_forest
from preftree.model.score import attach, leaf_logprobs
from preftree.train import step as step_module
from preftree.train.budget import choose_shape
from preftree.train.hpu import StepHook
from preftree.train.losses import LOSSES, LossSettings
from preftree.train.objective import Objective
from preftree.train.reference import Reference
from preftree.train.trainer import DPOTrainer
from tests.support import tiny
from tests.support.strategies import batches, random_batch
from tests.support.training import PAIRS, make_model, make_trainer, one_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate.*"),
]

SHAPE = Shape(tokens=96, scored=40, leaves=12)

# --- The layout ---


@settings(max_examples=50, deadline=None, derandomize=True)
@given(batch=batches(), tokens=st.integers(0, 5), scored=st.integers(0, 5), leaves=st.integers(0, 3))
def test_padding_comes_last_and_is_seen_by_nobody(batch: list[Bundle], tokens: int, scored: int, leaves: int) -> None:
    small = Forest.of(batch)
    shape = Shape(len(small) + tokens, len(small.target_S) + scored, len(small.leaf_ids) + leaves)
    forest = pad_forest(small, shape)
    size, many = len(small), len(small.target_S)
    for name in ("input_ids_T", "position_ids_T", "subtree_end_T"):
        assert torch.equal(getattr(forest, name)[:size], getattr(small, name))
        assert getattr(forest, name).shape == (shape.tokens,)
    for name in ("predictor_S", "target_S", "leaf_S"):
        assert torch.equal(getattr(forest, name)[:many], getattr(small, name))
        assert getattr(forest, name).shape == (shape.scored,)
    mask = torch.eye(shape.tokens, dtype=torch.bool)
    mask[:size, :size] = small.dense_mask()
    assert torch.equal(forest.dense_mask(), mask)
    assert (forest.leaf_ids, forest.leaf_lengths, forest.slots) == (small.leaf_ids, small.leaf_lengths, shape.leaves)
    assert [s.end - s.start for s in forest.segments[len(small.segments) :]] == [1] * tokens
    assert [x.tolist() for x in forest.unrolled()] == forest.unrolled_ids() == small.unrolled_ids()
    values = torch.arange(1.0, shape.scored + 1)
    expected = [
        *(float(part.sum()) for part in values[:many].split(small.leaf_lengths)),
    ]
    expected += [0.0] * (shape.leaves - len(expected))
    assert forest.sum_by_leaf(values).tolist() == expected


def test_what_does_not_fit_is_an_error() -> None:
    batch = [Bundle((1, 2), ((3, 4), (5,)), (0, 1))]
    forest = Forest.of(batch)
    assert len(pad_forest(forest, Shape(5, 3, 2))) == 5
    for shape in (Shape(4, 3, 2), Shape(5, 2, 2), Shape(5, 3, 1)):
        with pytest.raises(ValueError, match="does not fit"):
            pad_forest(forest, shape)


@pytest.mark.parametrize("shape", [SHAPE, Shape(96, 12, 12), Shape(96, 40, 2), Shape(30, 40, 12)], ids=str)
def test_packing_keeps_to_every_limit(shape: Shape) -> None:
    forests = forests_of_pairs(PAIRS, shape.tokens, shape=shape)
    assert sorted(i for forest in forests for i in forest.leaf_ids) == list(range(2 * len(PAIRS)))
    assert {(len(f), len(f.target_S), f.slots) for f in forests} == {(shape.tokens, shape.scored, shape.leaves)}
    assert len(forests_of_pairs(PAIRS, 96)) == 1
    assert (len(forests) > 1) == (shape is not SHAPE)


def test_the_shape_comes_from_the_data() -> None:
    pairs = [EncodedPair((1,) * (50 + i), (1,) * 30, (1,) * 20, i, "") for i in range(40)]
    choice = choose_shape(1000, pairs, pairs_per_step=8)
    assert choice.value.tokens == 1024
    assert choice.value.leaves == 16
    assert 512 <= choice.value.scored <= 640
    assert "--pad_max" in choice.reason
    # A step of 956 tokens on average fills one small forest, or three of the largest size allowed.
    assert choose_shape(16384, pairs, pairs_per_step=8).value.tokens == 1152
    assert choose_shape(400, pairs, pairs_per_step=8).value.tokens == 384
    long = EncodedPair((1,) * 900, (1,) * 700, (1,) * 20, 40, "")
    larger = choose_shape(1000, [*pairs, long], pairs_per_step=8).value
    forests = forests_of_pairs([*pairs, long], larger.tokens, shape=larger)
    assert sum(len(forest.leaf_ids) for forest in forests) == 82


# --- The numbers ---


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "mpt"])
@pytest.mark.parametrize("path", ["masked", "tiles", "padded", "plain"])
def test_padding_changes_no_log_prob(family: str, path: str) -> None:
    model = tiny.with_lora(tiny.FAMILIES[family]())
    batch = random_batch(1, bundles=3)
    scorer = attach(model, path)
    assert scorer.name == path
    small = leaf_logprobs(scorer, Forest.of(batch))
    padded = leaf_logprobs(scorer, pad_forest(small.forest, Shape(len(small.forest) + 9, len(small.token_S) + 7, 30)))
    for name, token_S in small.by_leaf().items():
        torch.testing.assert_close(padded.by_leaf()[name], token_S, rtol=1e-5, atol=1e-4)
    assert padded.sum_L[len(small.leaf_ids) :].tolist() == [0.0] * (30 - len(small.leaf_ids))
    found, expected = (tiny.gradients(model, scores.token_S[: len(small.token_S)]) for scores in (padded, small))
    assert tiny.relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("shape", [SHAPE, Shape(40, 20, 4)], ids=["one forest", "several"])
def test_a_step_with_padding_is_the_step_without(tmp_path: Path, loss_type: str, shape: Shape) -> None:
    """Loss, gradients and metrics; twice, because the second time the reference comes from memory."""
    objective = Objective(loss_type, settings=LossSettings(label_smoothing=0.1 if loss_type == "exo_pair" else 0.0))
    plain = make_trainer(make_model(), tmp_path, objective=objective)
    padded = make_trainer(make_model(), tmp_path, objective=objective, attention="masked")
    padded.step.budget, padded.step.shape = shape.tokens, shape
    padded.hook.fixed_shapes = True
    for _ in range(2):
        expected = one_step(plain, PAIRS)
        found = one_step(padded, PAIRS)
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert tiny.relative_error(found[1], expected[1]) < 5e-6
        assert padded.live_metrics.step.means() == pytest.approx(plain.live_metrics.step.means(), rel=1e-6)
    assert padded.live_metrics.speed.pairs == plain.live_metrics.speed.pairs == 2 * len(PAIRS)
    assert padded.reference.misses == 2 * len(PAIRS)


# --- The signature ---

#: Whatever reads a number back from the device, or makes a shape depend on contents.
HOST_SYNC = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal", "is_nonzero")


class Signature(TorchDispatchMode):
    """Each operation's name, the shapes and types of its tensors, and its other arguments, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in HOST_SYNC, f"{name} waits for the device, or makes shapes depend on contents"
        if name.startswith(("index", "_index")):
            given = [x for group in args if isinstance(group, list | tuple) for x in group if isinstance(x, Tensor)]
            assert all(x.dtype != torch.bool for x in given), "boolean indexing"
        self.lines.append(f"{func} {_described([*args, *(kwargs or {}).items()])}")
        return func(*args, **(kwargs or {}))

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}{value.stride()}{value.dtype}"
    if isinstance(value, list | tuple):
        # What is sent to the device is its contents, not part of the program.
        return [_described(x) for x in value]
    return str(value)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DPOTrainer:
    trainer = make_trainer(make_model(dtype=torch.float32), tmp_path, attention="masked")
    trainer.step.budget, trainer.step.shape = SHAPE.tokens, SHAPE
    trainer.hook = StepHook(fixed_shapes=True)

    def unrecorded(made_on_the_host: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            with _disable_current_modes():
                return made_on_the_host(*args)

        return made

    monkeypatch.setattr(Reference, "known", unrecorded(Reference.known))
    monkeypatch.setattr(step_module, "forests_of_pairs", unrecorded(forests_of_pairs))
    return trainer


def signatures_of_steps(trainer: DPOTrainer) -> list[str]:
    digests = []
    for pairs in (PAIRS[:3], PAIRS[1:4], PAIRS[3:6]):
        trainer.model.zero_grad()
        with Signature() as signature:
            trainer.training_step(trainer.model, {"pairs": pairs})
        digests.append(signature.digest)
        assert len(signature.lines) > 200  # forward and backward are in it
        assert any("threshold_backward" in line or "silu_backward" in line for line in signature.lines)
    return digests


def test_three_steps_have_one_signature(trainer: DPOTrainer) -> None:
    trainer.training_step(trainer.model, {"pairs": PAIRS})  # the reference is known from here on
    assert len(set(signatures_of_steps(trainer))) == 1


def test_so_has_the_reference(trainer: DPOTrainer) -> None:
    digests = []
    for pairs in (PAIRS[:3], PAIRS[3:6]):
        (forest,) = forests_of_pairs(pairs, SHAPE.tokens, shape=SHAPE)
        with Signature() as signature:
            trainer.reference._compute(forest)
        digests.append(signature.digest)
        assert len(signature.lines) > 100
    assert len(set(digests)) == 1


def test_without_padding_each_step_has_its_own(trainer: DPOTrainer) -> None:
    """Would the test above notice?"""
    trainer.step.budget, trainer.step.shape = 96, None
    trainer.step.plan(PAIRS)
    assert len(set(signatures_of_steps(trainer))) == 3


def test_all_forests_have_one_signature(trainer: DPOTrainer) -> None:
    """From one backward pass to the next, whatever is in the forest; gradients are added to, never stored."""
    trainer.step.budget, trainer.step.shape = 32, Shape(32, 12, 2)
    parts: list[list[str]] = []
    trainer.training_step(trainer.model, {"pairs": PAIRS})  # the reference is known from here on
    trainer.hook.run_gathered = lambda: parts.append(signature.lines[sum(map(len, parts)) :])
    trainer.model.zero_grad()
    with Signature() as signature:
        trainer.training_step(trainer.model, {"pairs": PAIRS})
    assert len(parts) > 3
    assert sum("zeros_like" in line for line in parts[0]) >= len(tiny.trained(trainer.model))
    assert len({tuple(part) for part in parts[1:]}) == 1
    assert sum("backward" in line for line in parts[1]) > 20
