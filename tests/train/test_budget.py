"""How large forests may be: measured, within a limit, with a reason."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch

from preftree.errors import SettingsError
from preftree.forest import Forest
from preftree.hardware import memory
from preftree.hardware.limits import Limit
from preftree.model.score import Scorer, attach, leaf_logprobs
from preftree.train import budget
from preftree.train.budget import Budget, choose_budget, kept_bytes
from tests.support import tiny
from tests.support.strategies import random_batch


def scorer() -> Scorer:
    return attach(tiny.with_lora(tiny.llama().float()))


def chosen(free: int, *sizes: int, limit: Limit | None = None, **more) -> Budget:  # type: ignore[no-untyped-def]
    """The budget where `free` bytes are there, none of them reserved."""
    with (
        mock.patch.object(budget, "available_memory", return_value=free),
        mock.patch.object(budget, "tightest_limit", return_value=limit),
        mock.patch.object(budget, "kept_bytes", return_value=1000.0),  # 4 layers of 32 numbers
        mock.patch.object(budget, "training_bytes", return_value=0),
        mock.patch.object(budget, "reserved", return_value=0),
    ):
        return choose_budget(scorer(), largest=max(sizes), **more)


PLAIN = 1000 * (4 + 1.5) / 4  # a token, with what lives for a moment
RECOMPUTED = 4 * 32 * 4 + 2.5 * 1000 / 4


def test_measured_memory_is_what_autograd_keeps() -> None:
    """Against the growth of what is kept between two sizes of one forest."""
    scored = scorer()
    found, causal = kept_bytes(scored), scored.causal
    kept = []
    for count in (4, 12):
        forest = Forest.of(random_batch(0, bundles=count))
        seen: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in (*causal.parameters(), *causal.buffers())}

        def hook(tensor: torch.Tensor, seen: dict[int, int] = seen, own: set[int] = own) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor):
            scores = leaf_logprobs(scored, forest)
        kept.append((len(forest), sum(seen.values())))
        del scores
    (few, less), (many, more) = kept
    assert found == pytest.approx((more - less) / (many - few), rel=0.15)


def test_measuring_keeps_no_model() -> None:
    scored = scorer()
    kept_bytes(scored)
    weights = [weakref.ref(parameter) for parameter in scored.causal.parameters()]
    del scored
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_enough_is_enough() -> None:
    found = chosen(10**12, 100)
    assert (found.tokens, found.checkpointing) == (2048, False)
    assert "more than 2048 is no faster on cpu" in found.reason


def test_what_fits() -> None:
    free = int(500 * PLAIN / budget.ACTIVATION_SHARE) + 1
    assert chosen(free, 300) == Budget(500, False, mock.ANY)


def test_activations_are_recomputed_where_the_largest_pair_needs_it() -> None:
    free = int(500 * PLAIN / budget.ACTIVATION_SHARE) + 1
    found = chosen(free, 100, 501)
    assert found.checkpointing
    assert found.tokens == int(budget.ACTIVATION_SHARE * free / RECOMPUTED)
    assert "largest pair (501 tokens) would not fit otherwise" in found.reason


def test_ranks_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limits", lambda: [Limit("a control group", 2**20, 2**18, shared=True)])
    assert memory.available_memory() == 3 * 2**18
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.available_memory() == 2**18
    assert "GiB free for each of 3 ranks here" in chosen(10**12, 100).reason


def test_asking_comes_first() -> None:
    assert chosen(10**6, 300, asked=77, checkpointing=True) == Budget(77, True, "asked for by --tokens_per_forest")


def test_too_little_memory_is_said_and_tried() -> None:
    found = chosen(1000, 300)
    assert found.tokens == 300
    assert "cannot be cut" in found.reason


def test_a_pair_that_no_limit_has_room_for_is_refused() -> None:
    limit = Limit("memory.max of the control group", 2**30, 2**29)
    assert chosen(400_000, 300, limit=limit).tokens == 300  # the estimate may be too careful: tried
    with pytest.raises(SettingsError, match=r"pair has 3000000 tokens .*; memory.max .* Raise that limit by \d"):
        chosen(400_000, 3_000_000, limit=limit)


def test_the_limit_is_named() -> None:
    limit = Limit("ulimit -v", 2**40, 2**30)
    assert "GiB free under ulimit -v" in chosen(10**12, 100, limit=limit).reason


def test_a_limit_leaves_room_for_the_process_itself() -> None:
    used = 3 * 10**8
    with mock.patch.object(budget.psutil, "Process") as process:
        process().memory_info().rss = used
        limit = used + int(400 * PLAIN) + 1
        assert chosen(10**12, 300, max_memory=limit).tokens == 400
        with pytest.raises(
            SettingsError, match=r"--max_memory .* is too little: .* the largest pair has 3000. Raise it by"
        ):
            chosen(10**12, 3000, max_memory=limit)


def test_the_reserve_is_kept_with_and_without_a_limit() -> None:
    """A head of 49,152 tokens holds whole chunks of logits, a tiny one never that much."""
    small, large = scorer().causal, scorer().causal
    large.config.vocab_size = 49152
    assert budget.RESERVE < budget.reserved(small) < budget.RESERVE + 2**21
    assert budget.reserved(large) == budget.RESERVE + 2 * budget.CHUNK_BYTES
    free = budget.reserved(small) + int(500 * PLAIN / budget.ACTIVATION_SHARE)
    with (
        mock.patch.object(budget, "available_memory", return_value=free),
        mock.patch.object(budget, "tightest_limit", return_value=None),
        mock.patch.object(budget, "kept_bytes", return_value=1000.0),
        mock.patch.object(budget, "training_bytes", return_value=0),
    ):
        assert choose_budget(scorer(), largest=300).tokens == pytest.approx(500, abs=1)
