"""Useful arithmetic, counted by hand."""

from __future__ import annotations

import pytest

from preftree.hardware.device import gemm_peak
from preftree.model.lora import add_lora
from preftree.train.flops import ModelFlops
from preftree.train.metrics import SpeedMeter
from tests.support import tiny


def test_work_of_a_tiny_llama() -> None:
    model = tiny.llama()
    attention = 32 * 64 + 2 * 32 * 32 + 64 * 32  # query, key and value of half the heads, output
    body = 4 * (attention + 3 * 32 * 48)
    bare = ModelFlops.of(model, peak=1.0)
    assert bare.per_token == 2 * body
    assert bare.per_scored == 2 * 32 * tiny.VOCABULARY
    assert ModelFlops.of(add_lora(model, rank=4).get_base_model(), peak=1.0) == bare  # LoRA's own products are extra


def test_the_first_epoch_pays_for_the_reference() -> None:
    flops = ModelFlops(per_token=10, per_scored=3, peak=1.0)
    speed = SpeedMeter(tree_tokens=7, scored_tokens=5)
    assert flops.useful(speed) == 2 * 7 * 10 + 2 * 5 * 3
    speed = SpeedMeter(tree_tokens=7, scored_tokens=5, reference_tokens=7, reference_scored=5)
    assert flops.useful(speed) == 3 * 7 * 10 + 3 * 5 * 3


def test_mfu_is_a_share_of_all_ranks() -> None:
    speed = SpeedMeter(tree_tokens=7)
    speed.started -= 100
    alone, shared = (ModelFlops(10, 3, peak=2.0).mfu(speed, ranks) for ranks in (1, 2))
    assert alone == pytest.approx(140 / 200, rel=1e-2)
    assert shared == pytest.approx(alone / 2, rel=1e-2)


def test_the_peak_is_a_rate() -> None:
    import torch

    assert 1e8 < gemm_peak("cpu", torch.float32, seconds=0.01) < 1e14
