"""What cannot be trained on is refused by the constructor, with the row or the field, not in the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from preftree import DPOConfig, DPOTrainer
from tests.support import tiny
from tests.support.against_trl import TEMPLATE, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TEXTS, CHATS = rows(5, False), rows(5, True)
IDS = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]} for _ in range(4)]


def changed(data: list[dict[str, Any]], row: int, **columns: Any) -> list[dict[str, Any]]:
    return [{**each, **columns} if number == row else each for number, each in enumerate(data)]


def without(data: list[dict[str, Any]], row: int, column: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in each.items() if number != row or k != column} for number, each in enumerate(data)]


def turn(**keys: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", **keys}]


#: Data -> what is said of it.
DATA: dict[str, tuple[Any, str]] = {
    "a name": ("pairs.jsonl", "`train_dataset` must be a `Dataset` or `IterableDataset`.* Got `str`"),
    "several splits": (DatasetDict({"train": Dataset.from_list(TEXTS)}), "Got `DatasetDict` instead"),
    "nothing": ([], "train_dataset is empty"),
    "an absent column": (without(TEXTS, 3, "rejected"), "train_dataset row 3 lacks `rejected`"),
    "None": (changed(TEXTS, 3, chosen=None), "train_dataset row 3 lacks `chosen`"),
    "a number": (changed(TEXTS, 2, chosen=5), "row 2: prompt and answers must all be texts.*`chosen` is int"),
    "text and messages": (changed(TEXTS, 2, chosen=CHATS[0]["chosen"]), "row 2: .*`chosen` is a list of messages"),
    "no messages": (changed(CHATS, 2, chosen=[]), "row 2: .*`chosen` is an empty list"),
    "a message without role": (changed(CHATS, 2, chosen=[{"content": "w11"}]), "row 2: .*list of something else"),
    "a message without content": (changed(CHATS, 2, chosen=turn()), "row 2: the chat template cannot render"),
    "a number for content": (changed(CHATS, 2, chosen=turn(content=7)), "row 2: the chat template cannot render"),
    "tools that are no JSON": (changed(CHATS, 2, tools="{"), "row 2: the chat template cannot render"),
    "text for kwargs": (changed(CHATS, 1, chat_template_kwargs="x"), "row 1: the chat template cannot render"),
    "no object": ([*TEXTS[:2], "text"], "train_dataset row 2: it must be an object with named columns. Got str"),
    "floats for ids": (changed(IDS, 1, chosen_ids=[1.5]), "row 1: column `chosen_ids` must be a list of token ids"),
    "negative ids": (changed(IDS, 1, chosen_ids=[-1]), "row 1: column `chosen_ids` must be a list of token ids"),
    "text for ids": (changed(IDS, 1, prompt_ids="abc"), "row 1: column `prompt_ids` must be a list of token ids"),
    "ids of another model": (changed(IDS, 1, chosen_ids=[97]), "row 1: .*token id 97, and the model's .* ends at 96"),
    "absent ids": (without(IDS, 2, "rejected_ids"), "row 2 lacks `rejected_ids`"),
    "an image": (changed(TEXTS, 0, images=[1]), "row 0 holds an image"),
    "equal answers": ([{"prompt": "w1", "chosen": "w2", "rejected": "w2"}], "no pair is left .*are identical"),
    "a stream of something else": (
        Dataset.from_list([{"a": "w1"}]).to_iterable_dataset(),
        "no known preference format",
    ),
}


def frozen() -> PreTrainedModel:
    return tiny.llama(num_hidden_layers=1).requires_grad_(False)  # type: ignore[no-any-return]


def classifier() -> PreTrainedModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=97, **sizes))


#: The constructor's other arguments -> what is said of them.
ARGUMENTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "evaluation rows": (
        lambda: {"eval_dataset": {"a": without(TEXTS, 1, "chosen")}},
        r"eval_dataset\['a'\] row 1 lacks",
    ),
    "frozen model": (lambda: {"model": frozen()}, "No weight of the model is trained"),
    "classifier": (lambda: {"model": classifier()}, "has no language-model head"),
    "no model": (lambda: {"model": 5}, "need a transformers causal language model, got int"),
    "tokenizer's name": (lambda: {"processing_class": "gpt2"}, "`processing_class` must be"),
    "reference's name": (lambda: {"ref_model": "gpt2"}, "`ref_model` must be a model.* Got `str`"),
    "reference of another vocabulary": (
        lambda: {"ref_model": tiny.llama(num_hidden_layers=1, vocab_size=50)},
        "47 tokens without an embedding in `ref_model`",
    ),
    "adapter as a dict": (lambda: {"peft_config": {"r": 4}}, "`peft_config` must be a `peft.PeftConfig`"),
    "adapter without a target": (lambda: {"peft_config": LoraConfig(target_modules=["no"])}, "cannot adapt"),
    "one callback": (lambda: {"callbacks": 5}, "`callbacks` must be a list of callbacks"),
    "metrics that are no function": (lambda: {"compute_metrics": 5}, "`compute_metrics` must be a function"),
    "unknown padding token": (lambda: {"pad_token": "<no>"}, "`pad_token`.* is not found"),
    "no room": (lambda: {"max_length": 2}, "no pair is left .*the prompt alone is as long as max_length"),
    "stream without an end": (
        lambda: {"train_dataset": Dataset.from_list(TEXTS).to_iterable_dataset(), "max_steps": -1},
        "is a stream, which does not tell its length: set `max_steps`",
    ),
}


def make(folder: Path, **given: Any) -> DPOTrainer:
    settings = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings |= {name: given.pop(name) for name in ("max_steps", "pad_token", "max_length") if name in given}
    standard = {
        "model": given.pop("model", None) or tiny.llama(num_hidden_layers=1),
        "train_dataset": TEXTS,
        "processing_class": tiny.word_tokenizer(TEMPLATE),
        "console": Console(quiet=True),
    }
    return DPOTrainer(args=DPOConfig(str(folder / "out"), **settings), **{**standard, **given})


@pytest.mark.parametrize(("data", "words"), DATA.values(), ids=DATA)
def test_data(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        make(tmp_path, train_dataset=data)


@pytest.mark.parametrize(("given", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(tmp_path: Path, given: Callable[[], dict[str, Any]], words: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        make(tmp_path, **given())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learning_rate": -1.0}, "--learning_rate must be at least 0"),
        ({"learning_rate": math.nan}, "--learning_rate must be at least 0"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1"),
        ({"loss_type": []}, "must name at least one loss"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, math.nan]}, "--loss_weights must be"),
        ({"adam_beta2": 1.0, "seed": -1}, "--adam_beta2 must be .*--seed must be"),
        ({"weight_decay": "0.1"}, "--weight_decay must be a number. Got '0.1'"),
        ({"optim": "apollo_adamw"}, "--optim apollo_adamw needs a package that is not installed"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate in --lr_scheduler_kwargs"),
        (
            {"lr_scheduler_kwargs": {"cycles": 2}},
            "--lr_scheduler_kwargs .* cannot be used with --lr_scheduler_type linear",
        ),
        ({"lr_scheduler_kwargs": '{"a": 2'}, "--lr_scheduler_kwargs must be a JSON object"),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": math.nan},
            "--f_alpha_divergence_coef must",
        ),
        ({"beta": "0.1"}, "--beta must be a number. Got '0.1' instead"),
        ({"beta": None}, "--beta must be a number. Got None"),
        ({"max_length": 8.5}, "--max_length must be a whole number or None. Got 8.5"),
        ({"loss_weights": 0.5}, "--loss_weights must be a list of numbers or None. Got 0.5"),
        ({"loss_type": ["sigmoid", 3]}, "--loss_type must be a string or a list of strings"),
        (
            {"disable_dropout": "yes", "bf16": "no"},
            "--bf16 must be True, False or None.*--disable_dropout must be True or",
        ),
        ({"model_init_kwargs": '{"dtype": '}, "--model_init_kwargs must be a JSON object, such as .*, or a dict"),
        ({"model_init_kwargs": "[1]"}, "--model_init_kwargs must be a JSON object, such as .*, or a dict"),
        ({"pad_to_multiple_of": "eight"}, "--pad_to_multiple_of must be at least 1, auto or None. Got 'eight'"),
        ({"dataset_num_proc": 0}, "--dataset_num_proc must be at least 1"),
        ({"precompute_ref_batch_size": -1}, "--precompute_ref_batch_size must be at least 1"),
        ({"router_aux_loss_coef": -0.1}, "--router_aux_loss_coef must be at least 0"),
    ],
)
def test_fields(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        DPOConfig(str(tmp_path), use_cpu=True, **fields)


def test_files_and_names(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        make(tmp_path)
    (tmp_path / "out").unlink()
    made = make(tmp_path, eval_dataset={"a": TEXTS})
    with pytest.raises(ValueError, match="no evaluation set named 'b': those that were given are a"):
        made.evaluate("b")
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    for options, words in (({"dtyp": 1}, "unexpected keyword argument 'dtyp'"), ({"dtype": "flot32"}, "Got 'flot32'")):
        args = DPOConfig(str(tmp_path), use_cpu=True, report_to=[], model_init_kwargs=options)
        with pytest.raises(ValueError, match=words):
            DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=TEXTS, console=Console(quiet=True))
