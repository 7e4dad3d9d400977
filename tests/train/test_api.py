"""`preftree.DPOTrainer` as scripts use it: models, adapters, references, data sets, and what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from preftree import DPOConfig, DPOTrainer
from preftree.errors import ModelError
from preftree.forest import Bundle, Forest
from preftree.train.noise import longest_paths
from tests.support import tiny
from tests.support.against_trl import TEMPLATE, rows
from tests.support.training import PAIRS, make_model, make_trainer, one_step

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LN2 = math.log(2)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))


def base() -> PreTrainedModel:
    return tiny.llama(num_hidden_layers=2)


def trainer(folder: Path, model: Any = None, data: Any = None, **more: Any) -> DPOTrainer:
    """A trainer of four pairs per step; what is no argument of the trainer goes to its configuration."""
    names = ("ref_model", "eval_dataset", "compute_metrics", "peft_config", "callbacks", "data_collator", "optimizers")
    given = {"console": more.pop("console", Console(quiet=True))}
    given |= {name: more.pop(name) for name in names if name in more}
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DPOTrainer(
        model or base(),
        args=DPOConfig(output_dir=str(folder / "out"), **{**defaults, **more}),
        train_dataset=rows(12, False) if data is None else data,
        processing_class=tiny.word_tokenizer(TEMPLATE),
        **given,
    )


def losses(made: DPOTrainer) -> list[float]:
    return [record["loss"] for record in made.state.log_history if "loss" in record]


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- What is trained, and what it is compared with ---


def test_full_fine_tuning_starts_at_ln_2_without_a_second_model(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    assert losses(made)[0] == pytest.approx(LN2, abs=1e-6)
    assert losses(made)[-1] < LN2 - 0.01
    assert made.ref_model is None
    assert made.reference.misses == 24  # all pairs before the first step


def test_full_fine_tuning_finds_its_reference_on_disk_again(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.train()
    second = trainer(tmp_path, beta=0.3)
    second.train()
    assert (second.reference.misses, first.reference.misses) == (0, 24)
    assert losses(second)[0] == pytest.approx(LN2, abs=1e-6)


def test_a_reference_model_stays_as_it_is(tmp_path: Path) -> None:
    second = base()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = state(second)
    made = trainer(tmp_path, ref_model=second)
    made.train()
    assert abs(losses(made)[0] - LN2) > 1e-4  # another model than the policy
    assert made.ref_model is second
    assert all(torch.equal(value, before[name]) for name, value in state(second).items())


@pytest.mark.parametrize("peft_config", [LORA, IA3Config(task_type="CAUSAL_LM")], ids=["LoRA", "IA3"])
def test_a_new_adapter_leaves_the_model_alone(tmp_path: Path, peft_config: Any) -> None:
    made = trainer(tmp_path, peft_config=peft_config)
    before = state(made.model)
    made.train()
    assert losses(made)[0] == pytest.approx(LN2, abs=1e-6)
    trained = {name for name, each in made.model.named_parameters() if each.requires_grad}
    for name, value in state(made.model).items():
        assert torch.equal(value, before[name]) == (name not in trained), name


def sft_adapter() -> PeftModel:
    """A model whose adapter says something: the result of earlier training."""
    return tiny.with_lora(base())


def test_the_reference_of_an_adapter_that_is_there_is_that_adapter(tmp_path: Path) -> None:
    model = sft_adapter()
    made = trainer(tmp_path, model)
    before = state(model)
    made.train()
    assert losses(made)[0] == pytest.approx(LN2, abs=1e-6)
    assert losses(made)[-1] < LN2 - 0.01
    assert set(model.peft_config) == {"default", "ref"}
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".default." in name for name in moved)
    made.save_model()
    assert not (tmp_path / "out" / "ref").exists()
    again = PeftModel.from_pretrained(base(), str(tmp_path / "out"))
    assert set(again.peft_config) == {"default"}


def test_a_fresh_adapter_needs_no_copy(tmp_path: Path) -> None:
    model = get_peft_model(base(), LORA)
    made = trainer(tmp_path, model)
    made.train()
    assert losses(made)[0] == pytest.approx(LN2, abs=1e-6)
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": r".*layers\.1.*\.(q|v)_proj"},
    ],
    ids=["modules_to_save", "bias", "rsLoRA", "DoRA", "head and embeddings", "regex"],
)
def test_every_kind_of_lora_is_trained_and_scored(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})
    made = trainer(tmp_path, peft_config=config)
    before = {name: each.detach().clone() for name, each in made.model.named_parameters() if each.requires_grad}
    made.train()
    assert losses(made)[0] == pytest.approx(LN2, abs=1e-5)
    assert losses(made)[-1] < LN2 - 1e-4
    after = dict(made.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_the_moving_reference_follows_the_policy(tmp_path: Path) -> None:
    made = trainer(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0, max_steps=4)
    start = state(made.ref_model)  # type: ignore[arg-type]
    seen: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **others: Any) -> None:
            now, policy = state(made.ref_model), state(made.model)  # type: ignore[arg-type]
            seen.append(all(torch.equal(now[name], policy[name]) for name in now))

    made.add_callback(Watch())
    made.train()
    assert seen == [False, True, False, True]
    assert any(not torch.equal(value, start[name]) for name, value in state(made.ref_model).items())  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["simpo", "cpo", "orpo", "sft"])
def test_no_reference_pass_where_none_is_needed(tmp_path: Path, loss: str) -> None:
    made = trainer(tmp_path, loss_type=loss, simpo_gamma=0.0)
    assert made.reference is None
    made.train()
    assert losses(made)[-1] < losses(made)[0]


def test_dropout_in_attention_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    """Trees have none, so that single sequences are trained on; a backend that was named is refused at once."""
    model = tiny.llama(num_hidden_layers=2, attention_dropout=0.5)
    with pytest.raises(ModelError, match="attention dropout is not possible over trees"):
        trainer(tmp_path, model, disable_dropout=False, attention="tiles")
    kept = trainer(tmp_path, model, disable_dropout=False, max_steps=1)
    assert not kept.scorer.shares_prompts
    kept.train()
    assert abs(losses(kept)[0] - LN2) > 1e-3
    assert trainer(tmp_path, tiny.llama(num_hidden_layers=2), disable_dropout=False).scorer.shares_prompts


def test_fields_without_meaning_change_nothing_and_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields: dict[str, Any] = {"padding_free": True, "pad_to_multiple_of": "8", "use_liger_kernel": True}
    fields |= {"precompute_ref_batch_size": 2, "dataset_num_proc": 2, "activation_offloading": True}
    plain, told = trainer(tmp_path, max_steps=2), trainer(tmp_path, max_steps=2, console=Console(), **fields)
    plain.train()
    told.train()
    assert losses(told) == losses(plain)
    said = capsys.readouterr().out
    assert [name for name in fields if f"note       {name}: No meaning" not in said] == []


# --- Losses that couple a step ---


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("more", [{}, {"ld_alpha": 0.4}], ids=["plain", "ld"])
def test_a_coupled_loss_does_not_depend_on_how_a_step_is_cut(tmp_path: Path, loss: str, more: dict[str, Any]) -> None:
    """One forest goes through autograd at once; several take two passes."""
    whole = make_trainer(make_model(), tmp_path, budget=10_000, loss_type=[loss, "sft"], **more)
    cut = make_trainer(make_model(), tmp_path, budget=20, loss_type=[loss, "sft"], **more)
    expected, found = one_step(whole, PAIRS), one_step(cut, PAIRS)
    assert cut.speed.forests > 3
    assert found[0] == pytest.approx(expected[0], abs=2e-6)
    assert tiny.relative_error(found[1], expected[1]) < 5e-6
    assert cut.step.evaluate(PAIRS).loss == pytest.approx(float(whole.step.evaluate(PAIRS).loss), abs=2e-6)


def test_both_passes_of_a_coupled_loss_drop_the_same(tmp_path: Path) -> None:
    """With dropout the first pass says what the second one does: the metrics of both agree."""
    made = make_trainer(make_model(dropout=0.5), tmp_path, budget=20, loss_type="aot")
    made.model.train()
    torch.manual_seed(3)
    plan = made.step.plan(PAIRS)
    logps = [parts[0] for parts in made.step._coupled(plan)]
    torch.manual_seed(3)
    first = [made.step.pair_logps(forest, plan) for forest in plan.forests]
    for one, other in zip(logps, first, strict=True):
        torch.testing.assert_close(one.chosen_P, other.chosen_P)


# --- Data sets ---


def stream(count: list[int]) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        while True:
            for row in rows(12, False):
                count[0] += 1
                yield row

    return IterableDataset.from_generator(generate)


@pytest.mark.parametrize(
    ("conversational", "implicit"),
    [(False, False), (True, False), (True, True)],
    ids=["standard", "conversational", "conversational, implicit"],
)
def test_the_layouts_hold_the_same_pairs(tmp_path: Path, conversational: bool, implicit: bool) -> None:
    data = rows(6, conversational)
    if implicit:
        data = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in data]
    made = trainer(tmp_path, data=Dataset.from_list(data), peft_config=LORA)
    assert made.train_dataset.column_names == ("prompt_ids", "chosen_ids", "rejected_ids")
    explicit = rows(6, False)
    for row, expected in zip(made.train_dataset, explicit, strict=True):
        ids = {name: [int(word[1:]) for word in expected[name].split()] for name in expected}
        turn = [3] if conversational else []
        assert row["chosen_ids"] == [*ids["chosen"], 2]
        assert row["rejected_ids"] == [*ids["rejected"], 2]
        assert row["prompt_ids"] == [*turn, *ids["prompt"], *([2, 3] if conversational else [])]


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    data = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 4
    made = trainer(tmp_path, data=data)
    assert made.train_dataset[0] == data[0]
    assert made.train_dataset["chosen_ids"] == [[7, 8]] * 4


def test_a_stream_is_read_no_further_than_needed(tmp_path: Path) -> None:
    count = [0]
    made = trainer(tmp_path, data=stream(count), max_steps=2)
    assert next(iter(made.train_dataset)).keys() == {"prompt_ids", "chosen_ids", "rejected_ids"}
    count[0] = 0
    made.train()
    assert len(losses(made)) == 2
    assert losses(made)[0] == pytest.approx(LN2, abs=1e-6)
    assert count[0] <= 600  # a batch of rows, and the one that says what they are
    assert made.ref_model is not None  # pairs that are not known beforehand need a model to ask


def test_other_formats_are_those_of_the_command(tmp_path: Path) -> None:
    orca = [
        {"system": "w10 w11", "question": "w12", "chosen": f"w{20 + i} w21", "rejected": f"w{30 + i}"} for i in range(4)
    ]
    made = trainer(tmp_path, data=orca)
    assert made.train_dataset[0]["chosen_ids"] == [20, 21, 2]


def test_long_prompts_are_dropped_and_answers_cut(tmp_path: Path) -> None:
    data = [
        {"prompt": "w10 " * 12, "chosen": "w11", "rejected": "w12"},
        {"prompt": "w10 w11", "chosen": "w12 " * 20, "rejected": "w13 w14"},
    ]
    made = trainer(tmp_path, data=data, max_length=8)
    assert len(made.train_dataset) == 1
    assert len(made.train_dataset[0]["chosen_ids"]) == 6
    kept = trainer(tmp_path, data=data[:1], max_length=8, truncation_mode="keep_end")
    assert len(kept.train_dataset[0]["prompt_ids"]) == 6


def test_several_evaluation_sets_and_rows_given_later(tmp_path: Path) -> None:
    sets = {"a": rows(4, False), "b": Dataset.from_list(rows(3, True))}
    made = trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=3, peft_config=LORA)
    made.train()
    record = next(record for record in made.state.log_history if "eval_a_loss" in record)
    assert {"eval_a_rewards/margins", "eval_a_entropy"} <= record.keys()
    assert any("eval_b_loss" in each for each in made.state.log_history)
    assert made.evaluate(rows(5, False))["eval_loss"] < LN2
    assert set(made.evaluate({"c": rows(4, False)})) >= {"eval_c_loss"}


@pytest.mark.parametrize("where", ["train", "eval", "one of several", "later"])
def test_no_reference_beforehand_of_a_stream(tmp_path: Path, where: str) -> None:
    data = Dataset.from_list(rows(4, False)).to_iterable_dataset()
    given = {"train": {"data": data}, "eval": {"eval_dataset": data}, "one of several": {"eval_dataset": {"a": data}}}
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` is not supported with IterableDataset"):
        trainer(tmp_path, precompute_ref_log_probs=True, **given.get(where, {})).evaluate({"b": data})


def test_a_run_without_log_lines_has_its_metrics_in_the_last_record(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=3, logging_steps=10)
    made.train()
    (record,) = made.state.log_history
    assert {"train_loss", "mean_token_accuracy", "rewards/margins", "num_tokens"} <= record.keys()
    assert record["rewards/margins"] > 0


def test_new_rows_after_full_fine_tuning_are_refused_with_the_reason(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=rows(12, False)[:4])
    assert made.evaluate(rows(13, True))["eval_loss"] == pytest.approx(LN2, abs=1e-6)  # before the first step it can
    made.train()
    assert made.evaluate()["eval_loss"] < LN2
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to"):
        made.evaluate([{"prompt": "w60 w61", "chosen": "w62", "rejected": "w63"}])


def test_compute_metrics_gets_logits_and_ids(tmp_path: Path) -> None:
    shapes = []

    def measure(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"my_metric": 0.5}

    made = trainer(tmp_path, eval_dataset=rows(3, False), compute_metrics=measure, per_device_eval_batch_size=2)
    assert made.evaluate()["eval_my_metric"] == 0.5
    ((logits, ids),) = shapes
    assert logits[:2] == ids
    assert logits[0] == 6  # both answers of each pair
    assert logits[2] == tiny.VOCABULARY


def test_predict_gives_logits_ids_and_metrics(tmp_path: Path) -> None:
    made = trainer(tmp_path, per_device_eval_batch_size=2)
    given = rows(3, False)
    found = made.predict(given)
    assert found.metrics["test_loss"] == pytest.approx(LN2, abs=1e-6)
    assert found.predictions.shape == (*found.label_ids.shape, tiny.VOCABULARY)
    ids = torch.from_numpy(found.label_ids)[:1]
    ids = ids[:, ids[0] > 0]  # without padding
    with torch.no_grad():
        expected = made.model.eval()(input_ids=ids).logits[0]
    torch.testing.assert_close(torch.from_numpy(found.predictions[0, : len(expected)]), expected, rtol=1e-4, atol=1e-4)
    without = trainer(tmp_path, prediction_loss_only=True).predict(given)
    assert (without.predictions, without.label_ids) == ((), None)


# --- Refused, with the reason ---


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data_collator": lambda rows: rows}, "packed into token trees"),
        ({"optim": "lomo"}, "updates weights within a backward pass"),
        ({"peft_config": LORA, "sync_ref_model": True}, "no second one can move"),
        (
            {"peft_config": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)},
            "virtual tokens before every sequence",
        ),
    ],
    ids=["collator", "LOMO", "sync with PEFT", "prompt tuning"],
)
def test_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, **more)


def test_data_that_is_no_data(tmp_path: Path) -> None:
    image = [{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}]
    with pytest.raises(ValueError, match="images are not supported"):
        trainer(tmp_path, data=image)
    with pytest.raises(ValueError, match="row 1 lacks `rejected`"):
        trainer(tmp_path, data=[rows(1, False)[0], {"prompt": "a", "chosen": "b", "rejected": None}])
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset`"):
        trainer(tmp_path, data="pairs.jsonl")
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        DPOTrainer(base(), args=DPOConfig(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="no pair is left"):
        trainer(tmp_path, data=[{"prompt": "w10", "chosen": "w11", "rejected": "w11"}])
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        trainer(tmp_path, data=stream([0]), precompute_ref_log_probs=True)


def test_everything_wrong_with_a_config_is_said_at_once() -> None:
    with pytest.raises(ValueError) as found:  # noqa: PT011
        DPOConfig("out", beta=-1, loss_type=["sigmoid", "ipoo"], loss_weights=[1.0], ld_alpha=2, use_cpu=True)
    for words in ("beta must be above 0", "ipoo", "`loss_weights` must have the same length", "ld_alpha"):
        assert words in str(found.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss_type": "exo_pair"}, "Label smoothing must be greater than 0.0"),
        ({"loss_type": "aot", "f_divergence_type": "forward_kl"}, "only supported for the following loss types"),
        ({"loss_type": "aot", "use_weighting": True}, "no weight belongs to one of them"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "has no meaning for --loss_type ipo"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "makes log-probs computed before stale"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DPOConfig("out", use_cpu=True, **fields)


def test_overrides_that_would_never_be_called_are_refused() -> None:
    with pytest.raises(TypeError, match="overrides get_batch_loss_metrics, which is never called"):
        type("Mine", (DPOTrainer,), {"get_batch_loss_metrics": lambda self: None})


# --- Precision and memory ---


def test_float16_weights_scale_the_loss(tmp_path: Path) -> None:
    """A loss whose gradients underflow in float16 without scaling still moves the adapter."""
    model = get_peft_model(base().half(), LORA)
    made = trainer(tmp_path, model, beta=1e-5, max_steps=2, attention="padded")
    assert made.accelerator.scaler is not None
    before = {name: each.detach().clone() for name, each in made.model.named_parameters() if "lora_B" in name}
    made.train()
    gradients = [record["grad_norm"] for record in made.state.log_history if "grad_norm" in record]
    assert all(0 < norm < 1e-2 for norm in gradients)  # unscaled before they are clipped
    assert all(not torch.equal(dict(made.model.named_parameters())[name], value) for name, value in before.items())


def test_neftune_is_noise_of_each_sequences_own_length(tmp_path: Path) -> None:
    """In training passes only, the same for the same seed; a tree's tokens get the noise of their longest sequence."""
    found = []
    for _ in range(2):
        made = trainer(tmp_path, peft_config=LORA, neftune_noise_alpha=50.0, max_steps=2, reference_cache=False)
        assert made.evaluate(rows(6, False))["eval_loss"] == pytest.approx(LN2, abs=1e-6)
        made.train()
        found.append(losses(made))
    assert abs(found[0][0] - LN2) > 1e-4
    assert found[0] == found[1]
    forest = Forest.of([Bundle((5, 6, 7), ((8, 9), (10, 11, 12, 13)), (0, 1))])
    assert longest_paths(forest).tolist() == [7, 7, 7, 5, 5, 7, 7, 7, 7]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_mixed_precision_starts_at_ln_2_and_learns(tmp_path: Path, precision: str, lora: bool, attention: str) -> None:
    """Weights stay float32, policy and reference are autocast alike, gradients of float16 are scaled."""
    more: dict[str, Any] = {"peft_config": LORA} if lora else {}
    plain, mixed = (
        trainer(tmp_path, attention=attention, max_steps=8, **more, **fields) for fields in ({}, {precision: True})
    )
    assert (mixed.accelerator.scaler is not None) == (precision == "fp16")
    plain.train()
    mixed.train()
    assert losses(mixed)[0] == pytest.approx(LN2, abs=1e-6)
    assert losses(mixed) == pytest.approx(losses(plain), abs=0.02)
    assert losses(mixed) != losses(plain)
    assert all(each.dtype == torch.float32 for each in mixed.model.parameters())


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_a_reference_computed_before_the_first_step_is_rounded_as_the_policy_is(tmp_path: Path, lora: bool) -> None:
    """Beside other prompts that begin alike an answer is rounded differently, and bfloat16 shows it."""
    draw = random.Random(0)
    system, *others = ([draw.randrange(3, tiny.VOCABULARY) for _ in range(90)] for _ in range(1 + 2 * 17))
    data = [
        {"prompt_ids": [*system[: 10 + 5 * number], 7 + number], "chosen_ids": chosen, "rejected_ids": rejected}
        for number, (chosen, rejected) in enumerate(zip(others[::2], others[1::2], strict=True))
    ]
    more: dict[str, Any] = {"peft_config": LORA, "precompute_ref_log_probs": True} if lora else {}
    more |= {"eval_dataset": data[12:], "learning_rate": 0.0, "max_steps": 3}
    made = trainer(tmp_path, base().bfloat16(), data[:12], **more)
    made.train()
    assert len(losses(made)) == 3
    assert losses(made) == pytest.approx([LN2] * 3, abs=1e-7)
    assert made.evaluate()["eval_loss"] == pytest.approx(LN2, abs=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_recomputation_changes_nothing(tmp_path: Path, reentrant: bool, lora: bool) -> None:
    more = {"peft_config": LORA} if lora else {}
    plain = trainer(tmp_path, max_steps=2, **more)
    plain.train()
    recomputing = trainer(
        tmp_path,
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        **more,
    )
    recomputing.train()
    assert losses(recomputing) == pytest.approx(losses(plain), abs=1e-6)


def test_model_tags_card_and_attributes(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=LORA)
    assert {"dpo", "trl"} <= set(made.model.base_model.model.model_tags)
    made.create_model_card(model_name="mine", dataset_name="someone/pairs")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "someone/pairs" in card
    assert "2305.18290" in card
