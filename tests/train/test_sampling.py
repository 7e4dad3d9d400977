"""--sample_prompts: answers with the adapter off and on, drawn ones with their distance; training is not touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftree.cli import main_train
from preftree.model.generate import Sampling, answer_batch
from preftree.report.read import read_run
from tests.support.command import command, write_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")
PROMPTS = ["w11 w12", "w20 w21 w22 w23 w24 w25 w26", "w40"]
TOKENS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without answers in A, with answers in B."""
    folder = write_inputs(tmp_path_factory.mktemp("sampling"))
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    flags: dict[str, object] = {"max_steps": 4, "learning_rate": 3e-2}
    assert main_train(command(folder, folder / "A", **flags)) == 0
    sampled = {"sample_prompts": folder / "prompts.txt", "sample_steps": 3, "sample_tokens": TOKENS}
    assert main_train(command(folder, folder / "B", **flags, **sampled)) == 0
    return folder


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "B/run/samples.jsonl").read_text().splitlines()]


def rendered(tokenizer: Any) -> list[list[int]]:
    conversations = [[{"role": "user", "content": text}] for text in PROMPTS]
    texts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in conversations]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_training_is_the_same_to_the_bit(runs: Path) -> None:
    first, second = ((runs / name / "adapter_model.safetensors").read_bytes() for name in "AB")
    assert first == second


def test_rounds_are_the_reference_once_and_the_policy_as_asked_and_at_the_end(runs: Path) -> None:
    found = samples(runs)
    rounds = list(dict.fromkeys((sample["step"], sample["model"], sample["mode"]) for sample in found))
    both = ("greedy", "sampled")
    steps = ((0, "reference"), (3, "policy"), (4, "policy"))
    assert rounds == [(step, model, mode) for step, model in steps for mode in both]
    assert [sample["prompt"] for sample in found] == PROMPTS * 6


def test_answers_are_those_of_the_model_without_and_with_its_adapter(runs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs / "model")
    model = AutoModelForCausalLM.from_pretrained(runs / "model", dtype=torch.float32)
    before = answer_batch(model, tokenizer, rendered(tokenizer), TOKENS)
    tuned = PeftModel.from_pretrained(model, runs / "B")
    after = answer_batch(tuned, tokenizer, rendered(tokenizer), TOKENS)
    by_model = {name: [s for s in samples(runs) if s["model"] == name and s["mode"] == "greedy"] for name in
                ("reference", "policy")}  # fmt: skip
    assert [sample["answer"] for sample in by_model["reference"]] == [answer.text for answer in before]
    assert [sample["answer"] for sample in by_model["policy"][-3:]] == [answer.text for answer in after]
    assert [sample["tokens"] for sample in by_model["policy"][-3:]] == [len(answer.ids) for answer in after]
    assert before != after  # a learning rate that changes answers, else nothing is compared


def test_log_ratios_are_those_of_single_sequences(runs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs / "model")
    base = AutoModelForCausalLM.from_pretrained(runs / "model", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, runs / "B")
    drawn = answer_batch(tuned, tokenizer, rendered(tokenizer), TOKENS, Sampling(temperature=1.0), seeds=[0, 1, 2])
    last = [sample for sample in samples(runs) if "log_ratio" in sample][-3:]
    assert [sample["answer"] for sample in last] == [answer.text for answer in drawn]
    for prompt, answer, sample in zip(rendered(tokenizer), drawn, last, strict=True):
        ids = torch.tensor([[*prompt, *answer.ids]])
        sums = []
        with torch.no_grad():
            for off in (False, True):
                with tuned.disable_adapter() if off else torch.no_grad():
                    logprobs = torch.log_softmax(tuned(input_ids=ids).logits[0].double(), -1)
                places = range(len(prompt), ids.shape[1])
                sums.append(sum(float(logprobs[place - 1, ids[0, place]]) for place in places))
        assert sample["log_ratio"] == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_the_report_shows_them(runs: Path) -> None:
    view = read_run(runs / "B")
    assert [answers.prompt for answers in view.answers] == PROMPTS * 2
    assert [step for step, _ in view.answer_lengths()] == [0, 3, 4]
    assert len(view.sampled.log_ratios) == len(PROMPTS)


def test_prompts_of_the_data_are_taken_by_number(runs: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 1, "sample_prompts": 3, "sample_tokens": 2}
    assert main_train(command(runs, tmp_path / "O", **flags)) == 0
    lines = (tmp_path / "O/run/samples.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    assert len(prompts) == 3
    assert all(prompt.startswith("<turn>") for prompt in prompts)


@pytest.mark.parametrize("value", ["0", "nothing.txt"])
def test_mistakes_are_found_before_anything_is_loaded(
    runs: Path, tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_train(command(runs, tmp_path / "O", sample_prompts=value)) == 2
    assert "--sample_prompts" in capsys.readouterr().err
