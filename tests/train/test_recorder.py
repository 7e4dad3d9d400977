"""What training leaves for reports: rewards of single pairs, lengths, extreme pairs; the same over ways of cutting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from preftree.cli import main_train
from preftree.data.encode import EncodedPair
from preftree.distributed.ranks import Ranks
from preftree.report.read import read_run
from preftree.train.pair_log import PairLog
from preftree.train.trainer import DPOTrainer
from tests.support.command import command, history, write_inputs
from tests.support.training import PAIRS, make_model, make_trainer, pair

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    inputs = write_inputs(folder)
    lengths = {"max_length": 26, "max_prompt_length": 25}
    flags = command(inputs, folder / "O", max_steps=6, logging_steps=3, save_strategy="no", **lengths)
    assert main_train(flags) == 0
    return folder / "O"


def test_rewards_of_single_pairs_have_the_means_that_are_logged(run: Path) -> None:
    found = records(run / "run" / "pairs.jsonl")
    assert [(record["step"], record["set"]) for record in found] == [(3, "train"), (6, "train"), (6, "eval")]
    logged = {("train", r["step"]): r["rewards/margins"] for r in history(run) if "rewards/margins" in r}
    logged |= {("eval", r["step"]): r["eval_rewards/margins"] for r in history(run) if "eval_loss" in r}
    for record in found:
        margins = [c - r for c, r in zip(record["chosen"], record["rejected"], strict=True)]
        mean = sum(margins) / len(margins)
        assert mean == pytest.approx(logged[record["set"], record["step"]], abs=2e-4)
    view = read_run(run)
    assert set(view.rewards["train"]) == set(range(view.lengths["train"].pairs))
    assert set(view.rewards["eval"]) == set(range(view.lengths["eval"].pairs))


def test_lengths_and_cuts_are_those_of_the_pairs(run: Path) -> None:
    lengths = read_run(run).lengths["train"]
    assert lengths.pairs == len(lengths.chosen) == len(lengths.prompt) == 10
    # Prompts have 22 to 25 tokens, so that answers of more than 4 to 1 are cut.
    cut = sum(c + p == 26 for c, p in zip(lengths.chosen, lengths.prompt, strict=True))
    assert 0 < lengths.chosen_cut <= cut
    said = read_run(run).facts["said"]
    assert any("10 to train on" in line for line in said)


def test_extreme_pairs_are_texts_of_those_pairs(run: Path) -> None:
    view = read_run(run)
    trained = [each for each in view.examples if each.set == "train"]
    assert [each.margin for each in trained] == sorted(each.margin for each in trained)
    for each in view.examples:
        chosen, rejected = view.rewards[each.set][each.pair][1]
        assert (chosen, rejected) == pytest.approx((each.chosen_reward, each.rejected_reward), abs=1e-4)
        assert each.source.startswith("pairs.jsonl:")
        assert "<turn>" in each.prompt


def test_a_run_that_goes_on_begins_with_the_rewards_up_to_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_inputs(tmp_path)
    flags = command(inputs, tmp_path / "O", max_steps=6, logging_steps=2, save_steps=2)
    real, steps = DPOTrainer.training_step, []

    def killed(self: DPOTrainer, *args: Any, **more: Any) -> Any:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    monkeypatch.setattr(DPOTrainer, "training_step", killed)
    assert main_train(flags) == 130
    assert [record["step"] for record in records(tmp_path / "O/run/pairs.jsonl")] == [2, 4]
    assert main_train(flags) == 0
    found = [record["step"] for record in records(tmp_path / "O/run/pairs.jsonl") if record["set"] == "train"]
    assert found == [2, 4, 6]


@pytest.mark.parametrize("budget", [40, 2000])
def test_forests_do_not_change_which_pair_has_which_reward(tmp_path: Path, budget: int) -> None:
    trainer = make_trainer(make_model(), tmp_path, budget=budget)
    trainer.pair_log = PairLog({"train": PAIRS}, trainer.ranks)
    trainer.training_step(trainer.model, {"pairs": list(PAIRS)})
    (together,) = trainer.pair_log.drain()
    assert sorted(together["pair"]) == list(range(len(PAIRS)))
    for place, chosen, rejected in zip(*(together[name] for name in ("pair", "chosen", "rejected")), strict=True):
        trainer.pair_log.add("train", [PAIRS[place]], trainer.step.evaluate([PAIRS[place]]).rewards)
        (alone,) = trainer.pair_log.drain()
        assert (alone["pair"], alone["chosen"], alone["rejected"]) == (
            [place], pytest.approx([chosen], abs=2e-4), pytest.approx([rejected], abs=2e-4)
        )  # fmt: skip
    assert trainer.pair_log.drain() == []


def test_pairs_of_no_set_are_left_out_and_extremes_are_sorted() -> None:
    others: list[EncodedPair] = [pair(9, (1,), (2,), (3,))]
    log = PairLog({"train": PAIRS}, Ranks())
    log.add("test", others, [([0], torch.ones(2, 1))])
    log.add("train", others, [([0], torch.ones(2, 1))])
    assert log.drain() == []
    rewards = torch.tensor([[1.0, 5.0, 3.0, 2.0, 4.0, 0.0], [0.0] * 6])
    log.add("train", PAIRS, [(list(range(6)), rewards)])
    log.drain()
    assert log.extremes("train", 2) == [5, 0, 4, 1]
    assert log.extremes("train", 3) == [5, 0, 3, 2, 4, 1]
