"""Pairs of one prompt in one step, each pair once an epoch, another order each epoch."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.data.encode import EncodedPair
from preftree.forest import forests_of_pairs
from preftree.train.order import PromptOrder
from tests.support.training import make_model, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate.*"),
]


def pairs(prompts: list[int]) -> list[EncodedPair]:
    return [EncodedPair((p, 5, 6), (10, 11, 2), (12, 20 + row, 2), row, "t") for row, p in enumerate(prompts)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=30), st.integers(0, 3))
def test_prompts_stand_together_and_no_pair_is_lost(prompts: list[int], seed: int) -> None:
    order = PromptOrder(pairs(prompts), seed)
    found = list(order)
    assert len(order) == len(prompts)
    assert sorted(found) == list(range(len(prompts)))
    runs = [prompt for prompt, _ in groupby(prompts[index] for index in found)]
    assert len(runs) == len(set(prompts))  # every prompt is one run
    assert list(PromptOrder(pairs(prompts), seed)) == found


def test_the_trainer_takes_it_anew_each_epoch_and_the_prompt_is_computed_once(tmp_path: Path) -> None:
    data = pairs([i // 3 for i in range(24)])
    trainer = make_trainer(make_model(), tmp_path, data, per_device_train_batch_size=6, by_prompt=True)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        steps = [batch["pairs"] for batch in loader]
        assert [len({pair.prompt_ids for pair in step}) for step in steps] == [2] * 4
        epochs.append([pair.row for step in steps for pair in step])
        for step in steps:
            (forest,) = forests_of_pairs(step, budget=1000)
            assert len(forest) == 2 * (3 + 3) + 6 * 3  # two prompts and their best answers once, all others
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == list(range(24))
