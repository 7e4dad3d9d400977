"""What one optimizer step computes must not depend on how it was cut, ordered, merged or attended."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from preftree.data.encode import EncodedPair
from preftree.errors import ModelError
from preftree.forest import Bundle, Forest
from preftree.model.determinism import remove_randomness
from preftree.model.score import attach
from preftree.train import step as step_module
from preftree.train.config import DPOConfig
from preftree.train.losses import LossSettings
from preftree.train.metrics import NAMES
from preftree.train.objective import Objective
from preftree.train.reference import Reference
from preftree.train.reference_models import AdapterOff
from preftree.train.trainer import DPOTrainer
from tests.support import tiny
from tests.support.training import PAIRS, Step, make_model, make_trainer, one_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    # accelerate on a machine whose torch.compile stack it does not know
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate.*"),
]

LN2 = math.log(2)


def assert_same_step(found: Step, expected: Step) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert tiny.relative_error(found[1], expected[1]) < 5e-6  # norms work in float32 backwards


def by_hand(model: PeftModel, pairs: Sequence[EncodedPair], beta: float = 0.1) -> Step:
    """The mean DPO loss over pairs and its gradients from the model's plain logits; nothing of the engine."""

    def answer_logp(prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
        return sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))  # type: ignore[return-value]

    losses = []
    for p in pairs:
        with torch.no_grad(), model.disable_adapter():
            reference = answer_logp(p.prompt_ids, p.chosen_ids) - answer_logp(p.prompt_ids, p.rejected_ids)
        policy = answer_logp(p.prompt_ids, p.chosen_ids) - answer_logp(p.prompt_ids, p.rejected_ids)
        losses.append(-F.logsigmoid(beta * (policy - reference)))
    loss = torch.stack(losses).mean()
    parameters = tiny.trained(model)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, grads, strict=True))


# --- One step ---


def test_a_step_is_the_mean_over_pairs(tmp_path: Path) -> None:
    expected = by_hand(make_model(), PAIRS)
    assert abs(expected[0] - LN2) > 0.01  # an adapter that says something
    assert_same_step(one_step(make_trainer(make_model(), tmp_path), PAIRS), expected)


@pytest.mark.parametrize("budget", [1, 20, 37, 10_000])
def test_any_budget(tmp_path: Path, budget: int) -> None:
    trainer = make_trainer(make_model(), tmp_path, budget=budget)
    assert_same_step(one_step(trainer, PAIRS), by_hand(make_model(), PAIRS))
    assert trainer.speed.forests == {1: 6, 20: 5, 37: 2, 10_000: 1}[budget]


@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 4, 3)], ids=str)
def test_any_order_inside_a_step(tmp_path: Path, order: tuple[int, ...]) -> None:
    expected = one_step(make_trainer(make_model(), tmp_path, budget=37), PAIRS)
    shuffled = [PAIRS[i] for i in order]
    assert_same_step(one_step(make_trainer(make_model(), tmp_path, budget=37), shuffled), expected)


def test_merged_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = make_trainer(make_model(), tmp_path, budget=10_000)
    expected = one_step(merged, PAIRS)

    def alone(pairs: Sequence[EncodedPair], *_: object) -> list[Forest]:
        """Every answer under a prompt of its own, all in one forest."""
        trees = []
        for i, p in enumerate(pairs):
            for leaf, answer in ((2 * i, p.chosen_ids), (2 * i + 1, p.rejected_ids)):
                trees.append(trainer_tree(p.prompt_ids, answer, leaf))
        return [Forest.plant(trees)]

    monkeypatch.setattr(step_module, "forests_of_pairs", alone)
    unmerged = make_trainer(make_model(), tmp_path)
    assert_same_step(one_step(unmerged, PAIRS), expected)
    assert merged.speed.tree_tokens < unmerged.speed.tree_tokens == unmerged.speed.unrolled_tokens
    assert merged.speed.saved_share > 0.3


def trainer_tree(prompt: tuple[int, ...], answer: tuple[int, ...], leaf: int):  # type: ignore[no-untyped-def]
    from preftree.forest import grow

    return grow([Bundle(prompt, (answer,), (leaf,))])[0]


@pytest.mark.parametrize("attention", ["dense", "padded", "plain"])
def test_any_attention(tmp_path: Path, attention: str) -> None:
    trainer = make_trainer(make_model(), tmp_path, attention=attention)
    assert_same_step(one_step(trainer, PAIRS), by_hand(make_model(), PAIRS))


def test_checkpointing(tmp_path: Path) -> None:
    expected = one_step(make_trainer(make_model(), tmp_path), PAIRS)
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    tiny.checkpoint(model)
    replayed: list[int] = []
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    next(layers[0].children()).register_forward_pre_hook(lambda *_: replayed.append(torch.is_grad_enabled()))
    assert_same_step(one_step(trainer, PAIRS), expected)
    assert sum(replayed) == 2 * trainer.speed.forests


def test_the_flag_switches_checkpointing_on(tmp_path: Path) -> None:
    model = make_model()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    assert not any(layer.gradient_checkpointing for layer in layers)
    make_trainer(model, tmp_path, gradient_checkpointing=True).train()
    assert all(layer.gradient_checkpointing for layer in layers)


def test_duplicates_count_twice(tmp_path: Path) -> None:
    """A pair that occurs twice has twice the weight, though its tree occurs once."""
    twice = [*PAIRS[:2], PAIRS[0]]
    assert_same_step(one_step(make_trainer(make_model(), tmp_path), twice), by_hand(make_model(), twice))


# --- The start ---


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_the_first_loss_is_ln_2(tmp_path: Path, attention: str) -> None:
    model = make_model(dtype=torch.float32, trained=False, dropout=0.05)
    assert remove_randomness(model)
    trainer = make_trainer(model, tmp_path, attention=attention)
    loss, _ = one_step(trainer, PAIRS)
    assert loss == pytest.approx(LN2, abs=1e-6)
    assert trainer.since_log.means()["rewards/accuracies"] == 0.0


def test_with_dropout_left_on_it_is_not(tmp_path: Path) -> None:
    """The check above would notice: a trained adapter under dropout is another function each time."""
    model = make_model(dtype=torch.float32, dropout=0.5)
    trainer = make_trainer(model, tmp_path)
    first, _ = one_step(trainer, PAIRS)
    second, _ = one_step(trainer, PAIRS)
    assert abs(first - second) > 1e-4
    remove_randomness(model)
    assert one_step(trainer, PAIRS)[0] == one_step(trainer, PAIRS)[0]


# --- Whole runs ---


def run(folder: Path, pairs: Sequence[EncodedPair] = PAIRS, **args: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps and the adapter that came out."""
    model = make_model(trained=False)
    trainer = make_trainer(model, folder, pairs, **args)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, {name: p.detach().clone() for name, p in tiny.trained(model).items()}


@pytest.fixture(scope="module")
def four_by_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    return run(tmp_path_factory.mktemp("4x1"), num_train_epochs=3, max_steps=-1)


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"budget": 1},
        {"attention": "padded"},
        {"gradient_checkpointing": True},
    ],
    ids=["2x2", "1x4", "one pair per forest", "padded", "checkpointing"],
)
def test_runs_that_must_be_equal(
    tmp_path: Path, four_by_one: tuple[list[float], dict[str, Tensor]], changes: dict[str, Any]
) -> None:
    losses, adapter = run(tmp_path, num_train_epochs=3, max_steps=-1, **changes)
    expected, expected_adapter = four_by_one
    # 6 pairs make a step of 4 and a step of 2, three times over.
    assert len(expected) == len(losses) == 6
    assert expected[0] == pytest.approx(LN2, abs=1e-6)
    assert expected[-1] < expected[0] - 0.05
    assert losses == pytest.approx(expected, abs=1e-5)
    assert tiny.relative_error(adapter, expected_adapter) < 1e-4


def test_the_last_short_step_is_a_mean_over_its_own_pairs(tmp_path: Path) -> None:
    """5 pairs in steps of 4: the last one has a single pair, and its full loss, not a quarter."""
    seen: list[list[EncodedPair]] = []
    model = make_model()
    trainer = make_trainer(model, tmp_path, PAIRS[:5], max_steps=2, learning_rate=0.0, weight_decay=0.0)
    step = trainer.training_step

    def spy(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        seen.append(inputs["pairs"])
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = spy  # type: ignore[method-assign]
    trainer.train()
    assert [len(pairs) for pairs in seen] == [4, 1]
    assert sorted(p.row for pairs in seen for p in pairs) == [0, 1, 2, 3, 4]
    logged = [record for record in trainer.state.log_history if "loss" in record]
    for pairs, record in zip(seen, logged, strict=True):
        loss, grads = by_hand(model, pairs)
        assert record["loss"] == pytest.approx(loss, abs=1e-5)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in grads.values()))
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_what_is_logged(tmp_path: Path) -> None:
    model = make_model(trained=False)
    # All pairs in each step, so that the second sees what the first learned.
    args: dict[str, Any] = {
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 2,
    }
    trainer = make_trainer(model, tmp_path, evaluated=PAIRS[:3], **args)
    trainer.train()
    trained = [record for record in trainer.state.log_history if "loss" in record]
    evaluated = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert [record["step"] for record in trained] == [record["step"] for record in evaluated] == [1, 2]
    assert {*NAMES, "learning_rate", "grad_norm", "epoch", "step"} <= trained[0].keys()
    assert {f"eval_{name}" for name in NAMES} <= evaluated[0].keys()
    for record in trained:
        margin = record["rewards/chosen"] - record["rewards/rejected"]
        assert record["rewards/margins"] == pytest.approx(margin, abs=1e-9)
    assert trained[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert trained[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert trained[1]["rewards/margins"] > 0
    # Summed over the tokens of each answer, as in the paper.
    assert trained[0]["logps/chosen"] < -5


def test_evaluation_weights_pairs_and_changes_nothing(tmp_path: Path) -> None:
    model = make_model()
    # 5 pairs in batches of 2: a mean over batches would give the last pair twice the weight. Two are turned
    # round, so that a random adapter gets some right and some wrong.
    pairs = [
        *PAIRS[:3],
        *(replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in PAIRS[3:5]),
    ]
    trainer = make_trainer(model, tmp_path, evaluated=pairs, per_device_eval_batch_size=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(by_hand(model, pairs)[0], abs=1e-6)
    each = [by_hand(model, [p])[0] for p in pairs]
    assert abs(((each[0] + each[1]) / 2 + (each[2] + each[3]) / 2 + each[4]) / 3 - metrics["eval_loss"]) > 1e-3
    right = sum(loss < LN2 for loss in each)
    assert 0 < right < 5
    assert metrics["eval_rewards/accuracies"] == right / 5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_other_objectives_reach_the_step(tmp_path: Path) -> None:
    losses = {
        objective: one_step(make_trainer(make_model(), tmp_path, objective=objective), PAIRS)[0]
        for objective in (
            Objective(),
            Objective(settings=LossSettings(beta=0.3)),
            Objective(settings=LossSettings(label_smoothing=0.2)),
            Objective("ipo"),
            Objective("hinge"),
        )
    }
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)


# --- The reference ---


def test_the_reference_is_the_model_without_its_adapter() -> None:
    model = make_model()
    scorer = attach(model)
    forest = Forest.of([Bundle(p.prompt_ids, (p.chosen_ids,), (i,)) for i, p in enumerate(PAIRS)])
    with torch.no_grad():
        base = tiny.plain_logprobs(tiny.llama(num_hidden_layers=2).double(), forest)
        adapted = tiny.plain_logprobs(model, forest)
    found = Reference(AdapterOff(scorer)).token_logprobs(forest)
    assert not found.requires_grad
    torch.testing.assert_close(found, base, rtol=0, atol=1e-6)
    assert float((adapted - base).abs().max()) > 0.1


def test_the_reference_is_computed_once(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(trained=False), tmp_path, max_steps=-1, num_train_epochs=3)
    trainer.train()
    answers = 2 * len(PAIRS)
    assert trainer.reference.misses == answers  # the first epoch
    assert trainer.reference.hits == 2 * answers  # the two after it
    assert trainer.state.global_step == 6


def test_the_reference_is_found_again_by_content() -> None:
    model = make_model()
    reference = Reference(AdapterOff(attach(model)))

    def ask(prompt: tuple[int, ...], answer: tuple[int, ...], name: int = 0) -> Tensor:
        return reference.token_logprobs(Forest.of([Bundle(prompt, (answer,), (name,))]))

    first = ask((5, 6, 7), (8, 9))
    assert (reference.misses, reference.hits) == (1, 0)
    assert torch.equal(ask((5, 6, 7), (8, 9), name=9), first)  # another row, the same tokens
    assert (reference.misses, reference.hits) == (1, 1)
    ask((5, 6), (7, 8, 9))  # the same tokens, but more of them scored
    assert (reference.misses, reference.hits) == (2, 1)
    ask((6, 5, 7), (8, 9))
    assert (reference.misses, reference.hits) == (3, 1)
    # Known and unknown answers in one forest, in the forest's order.
    both = Forest.of([Bundle((5, 6, 7), ((11,), (8, 9)), (0, 1))])
    mixed = reference.token_logprobs(both)
    assert (reference.misses, reference.hits) == (4, 2)
    torch.testing.assert_close(mixed[1:], first, rtol=0, atol=1e-6)


def test_no_reference_where_the_base_is_trained_too() -> None:
    model = make_model()
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ModelError, match=r"1 other weights are trained too .*norm\.weight"):
        AdapterOff(attach(model))


def test_computing_the_reference_leaves_the_model_in_its_mode() -> None:
    model = make_model()
    scorer = attach(model)
    forest = Forest.of([Bundle((5, 6, 7), ((8, 9),), (0,))])
    for training in (True, False):
        model.train(training)
        Reference(AdapterOff(scorer)).token_logprobs(forest)
        assert model.training is training
        assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


# --- What is left on disk ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(dtype=torch.float32, trained=False)
    trainer = make_trainer(model, folder, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder, model


def test_the_adapter_loads_with_peft(saved: tuple[Path, PeftModel]) -> None:
    folder, model = saved
    again = PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), str(folder))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits
        with again.disable_adapter():
            base = again(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((base - expected).abs().max()) > 1e-2


def test_nothing_pickled_stands_beside_the_adapter(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert list(folder.rglob("training_args.bin")) == []
    assert list(folder.glob("*.bin")) == list(folder.glob("*.pt")) == []
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [record["step"] for record in history if "loss" in record] == [1, 2]


def test_a_checkpoint_holds_the_adapter_of_its_step(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    first, last = (
        PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), str(folder / name)).state_dict()
        for name in ("checkpoint-1", "checkpoint-2")
    )
    final = PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), str(folder)).state_dict()
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert moved
    assert all(".lora_" in name for name in moved)
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_the_users_arguments_stay_as_given(tmp_path: Path) -> None:
    args = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        use_cpu=True,
        report_to=[],
    )
    kept = args.to_dict()
    trainer = DPOTrainer(
        make_model(),
        args=args,
        train_dataset=PAIRS,
        processing_class=tiny.word_tokenizer(),
        console=Console(quiet=True),
    )
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (6, 1)
    assert args.to_dict() == kept
