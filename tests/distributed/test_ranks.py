"""What ranks agree on, without starting any."""

from __future__ import annotations

import torch

from preftree.distributed.ranks import Ranks
from preftree.train.metrics import SpeedMeter
from preftree.train.store import from_bytes, to_bytes


def test_one_rank_exchanges_nothing() -> None:
    ranks = Ranks()
    assert (ranks.index, ranks.count, ranks.lockstep) == (0, 1, False)
    assert not Ranks(lockstep=True).lockstep  # nobody to keep step with
    assert ranks.gather([3, 4]) == [[3, 4]]
    (content,) = ranks.gather_bytes(torch.tensor([1, 2], dtype=torch.uint8))
    assert content.tolist() == [1, 2]
    tensor = torch.tensor([1.0])
    ranks.add_up([tensor])
    ranks.copy_from_first([tensor])
    ranks.check_same("weights", "abc")
    assert tensor.item() == 1.0


def test_answers_travel_as_they_are() -> None:
    """Float64 log-probs too, and none at all."""
    answers = {bytes([i]) * 16: torch.randn(i + 1, dtype=torch.float64) for i in range(3)}
    found = from_bytes(to_bytes(answers))
    assert found.keys() == answers.keys()
    assert all(torch.equal(found[key], value) for key, value in answers.items())
    assert from_bytes(to_bytes({})) == {}


def test_counts_of_all_ranks() -> None:
    one, other = SpeedMeter(tree_tokens=30, pairs=2, forests=1), SpeedMeter(tree_tokens=50, pairs=2, forests=3)
    step = SpeedMeter.of_ranks([one.counts(), other.counts()])
    assert (step.tree_tokens, step.pairs, step.forests, step.slowest_tokens) == (80, 4, 4, 50)
    run = SpeedMeter()
    for _ in range(2):
        run.merge(step)
    assert run.imbalance(2) == 0.25  # 100 tokens on the busiest ranks where 80 would have been even
    assert SpeedMeter().imbalance(2) == 0.0
