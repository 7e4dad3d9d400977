"""Every argument of lm-eval's `hf` either acts as it does there, or is refused by name."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from preftree.errors import SettingsError
from preftree.evaluate.harness import PreftreeLM
from preftree.evaluate.options import INHERITED, OWN, check_options
from tests.evaluate.conftest import asked, words
from tests.support import tiny

ACTING: dict[str, Any] = {
    "add_bos_token": True,
    "prefix_token_id": 3,
    "max_length": 20,
    "dtype": "float64",
    "revision": "main",
    "backend": "causal",
    "softmax_dtype": "float32",
    "truncation": True,
    "batch_size": 3,
    "max_batch_size": 2,
    "think_end_token": "w7",
    "chat_template_args": {"loud": True},
}
"""A value of each argument that acts, or that asks for what happens anyway."""
REFUSED: dict[str, Any] = {
    "subfolder": "x",
    "logits_cache": False,
    "mixed_precision_dtype": "bfloat16",
    "trust_remote_code": True,
    "use_fast_tokenizer": False,
    "parallelize": True,
    "max_memory_per_gpu": "1GiB",
    "max_cpu_memory": "1GiB",
    "offload_folder": "x",
    "tp_plan": "auto",
    "delta": "x",
    "autogptq": True,
    "gptqmodel": True,
    "gguf_file": "x",
    "kwargs": {"load_in_4bit": True},
}
#: Arguments with tests of their own below or beside.
ELSEWHERE = {"self", "pretrained", "tokenizer", "device", "peft", "enable_thinking"}


def test_all_arguments_of_hf_are_tried() -> None:
    assert set(inspect.signature(HFLM.__init__).parameters) == ACTING.keys() | REFUSED.keys() | ELSEWHERE


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused(name: str) -> None:
    options = REFUSED[name] if name == "kwargs" else {name: REFUSED[name]}
    (argument,) = options
    with pytest.raises(SettingsError, match=f"--model_args {argument}="):
        PreftreeLM(tiny.llama(), tokenizer=tiny.word_tokenizer(), **options)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"kwargs"}))
def test_the_default_of_hf_is_never_refused(name: str) -> None:
    check_options({name: inspect.signature(HFLM.__init__).parameters[name].default})


@pytest.mark.parametrize("name", ACTING)
def test_what_acts_gives_the_answers_of_hf(name: str, models: Path) -> None:
    """From a folder, with a tokenizer that adds no BOS by itself."""
    rng = random.Random(1)
    pairs = [(words(rng, rng.randint(1, 30)), f" {words(rng, rng.randint(1, 4))}") for _ in range(6)]
    requests = asked("loglikelihood", [*pairs, ("", words(rng, 3)), ("", "<bos> w9"), ("w5  ", "w6")])
    common: dict[str, Any] = {"dtype": "float32", "device": "cpu", name: ACTING[name]}
    ours, theirs = PreftreeLM(str(models / "base"), **common), HFLM(str(models / "base"), **common)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [a[0] for a in found] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [a[1] for a in found] == [e[1] for e in expected]
    for attribute in ("batch_size", "max_batch_size", "truncation", "think_end_token", "chat_template_args"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute


def test_a_bos_that_is_asked_for_changes_the_answers(models: Path) -> None:
    requests = asked("loglikelihood", [("w5 w6", " w7"), ("w8", " w9 w10")])
    without, having = (
        PreftreeLM(str(models / "base"), dtype="float32", device="cpu", **options).loglikelihood(requests)
        for options in ({}, {"add_bos_token": True})
    )
    assert all(abs(a[0] - b[0]) > 1e-2 for a, b in zip(without, having, strict=True))


def test_a_tokenizer_from_another_folder(models: Path, tmp_path: Path) -> None:
    other = tiny.word_tokenizer()
    other.bos_token = "<turn>"
    other.save_pretrained(tmp_path)
    common = {"tokenizer": str(tmp_path), "add_bos_token": True, "dtype": "float32", "device": "cpu"}
    ours, theirs = PreftreeLM(str(models / "base"), **common), HFLM(str(models / "base"), **common)
    assert ours.tok_encode("w5 w6") == theirs.tok_encode("w5 w6") == [3, 5, 6]


def test_thinking_is_for_tasks_that_generate(models: Path) -> None:
    with pytest.raises(SettingsError, match="think_end_token is required"):
        PreftreeLM(tiny.llama(), tokenizer=tiny.word_tokenizer(), enable_thinking=True)
    lm = PreftreeLM(tiny.llama(), tokenizer=tiny.word_tokenizer(), enable_thinking=True, think_end_token="w7")
    with pytest.raises(SettingsError, match=r"enable_thinking=True is for tasks that generate.*\(task\)"):
        lm.loglikelihood(asked("loglikelihood", [("w5", " w6")]))


def test_misspelt_arguments_get_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="Did you mean prefix_token_id"):
        check_options({"prefix_tokn_id": 1})
    assert not INHERITED & OWN
