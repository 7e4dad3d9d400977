"""LoRA over weights that bitsandbytes has quantized, on a CPU: values, gradients, the command, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

from preftree import DPOConfig, DPOTrainer
from preftree.cli import main_train
from preftree.config import shared
from preftree.config.train import parse_settings
from preftree.errors import SettingsError
from preftree.model.load import load_model, resolve
from tests.support import tiny
from tests.support.against_trl import TEMPLATE, rows
from tests.support.command import command, losses, write_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the quantize extra has it)"
)
FOUR = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.llama(num_hidden_layers=2, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def trainer(model: Any, folder: Path, **more: Any) -> DPOTrainer:
    args = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    given = {name: more.pop(name) for name in ("quantization_config", "peft_config") if name in more}
    return DPOTrainer(
        str(model) if isinstance(model, Path) else model,
        args=DPOConfig(str(folder / "out"), per_device_train_batch_size=6, use_cpu=True, **{**args, **more}),
        train_dataset=rows(6, False),
        processing_class=tiny.word_tokenizer(TEMPLATE),
        console=Console(quiet=True),
        **given,
    )


def by_hand(made: DPOTrainer) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step from single sequences through the model's own forward."""
    model, total = made.model, torch.zeros(())

    def logp(prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()

    for pair in made.train_dataset.pairs:
        sides = [(pair.prompt_ids, answer) for answer in pair.answers]
        with torch.no_grad(), model.disable_adapter():
            reference = logp(*sides[0]) - logp(*sides[1])
        total = total - F.logsigmoid(0.1 * (logp(*sides[0]) - logp(*sides[1]) - reference)) / len(made.train_dataset)
    trained = [p for p in model.parameters() if p.requires_grad]
    return float(total.detach()), list(torch.autograd.grad(total, trained))


@needs_bitsandbytes
@pytest.mark.parametrize("quantized", [FOUR, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
def test_trees_are_single_sequences(folder: Path, tmp_path: Path, quantized: dict[str, Any]) -> None:
    config = BitsAndBytesConfig(**quantized)
    made = trainer(folder, tmp_path, quantization_config=config, peft_config=LORA)
    assert made.scorer.shares_prompts
    adapted = [name for name, module in made.model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) == 2 * 7  # every linear layer: quantized ones pass gradients on
    trained = [p for p in made.model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained:  # an adapter that says something
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected, expected_grads = by_hand(made)
    assert abs(expected - math.log(2)) > 1e-3
    made.model.zero_grad()
    found = made.training_step(made.model, {"pairs": list(made.train_dataset.pairs)})
    # 8-bit layers compute in float16.
    tolerance = 2e-5 if "load_in_4bit" in quantized else 5e-3
    assert float(found) == pytest.approx(expected, abs=tolerance)
    error = sum(float((p.grad - want).square().sum()) for p, want in zip(trained, expected_grads, strict=True))  # type: ignore[operator]
    size = sum(float(want.square().sum()) for want in expected_grads)
    assert math.sqrt(error / size) < (1e-4 if "load_in_4bit" in quantized else 5e-2)


@needs_bitsandbytes
@pytest.mark.parametrize("quantized", [FOUR, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
def test_training_starts_at_ln_2_and_learns(folder: Path, tmp_path: Path, quantized: dict[str, Any]) -> None:
    made = trainer(folder, tmp_path, quantization_config=BitsAndBytesConfig(**quantized), peft_config=LORA)
    made.train()
    history = [record["loss"] for record in made.state.log_history if "loss" in record]
    assert history[0] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1] < math.log(2) - 0.005
    made.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@needs_bitsandbytes
def test_a_model_that_was_evaluated_before_passes_gradients_on(folder: Path, tmp_path: Path) -> None:
    """bitsandbytes reorders 4-bit weights in eval mode, on processors with AVX-512 in bfloat16, without gradients."""
    options = {"quantization_config": BitsAndBytesConfig(**FOUR)}
    model = load_model(resolve(str(folder)), torch.float32, **options)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(5)[None])
    made = trainer(model, tmp_path, peft_config=LORA)
    expected = trainer(folder, tmp_path, peft_config=LORA, **options)
    for each in (made, expected):
        each.train()
    first, second = ([r["loss"] for r in each.state.log_history if "loss" in r] for each in (made, expected))
    assert first == pytest.approx(second, abs=1e-3)  # that order holds its scales in bfloat16


@needs_bitsandbytes
def test_full_fine_tuning_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be fine-tuned in full: its weights have no gradients"):
        trainer(folder, tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@needs_bitsandbytes
@pytest.mark.parametrize("flags", [{"load_in_4bit": "true", "use_bnb_nested_quant": "true"}, {"load_in_8bit": "true"}])
def test_the_command(tmp_path: Path, flags: dict[str, str]) -> None:
    inputs = write_inputs(tmp_path)
    assert main_train(command(inputs, tmp_path / "out", max_steps=2, **flags)) == 0
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) >= 7


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"--load_in_4bit needs a package .* pip install bitsandbytes"):
        parse_settings(command(tmp_path, tmp_path / "out", load_in_4bit="true"))
