"""Training mode is evaluation mode: whatever a model draws random numbers for is found by running it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from preftree.errors import ModelError
from preftree.model.determinism import check_causal, remove_randomness
from preftree.model.lora import add_lora
from tests.support import families, tiny


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 63)[None] % tiny.VOCABULARY, use_cache=False).logits


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "seed_oss",  # a functional dropout under a name of its own
        "starcoder2",
        "phimoe",  # samples experts in training mode, and its noise level matters in evaluation mode too
        "mixtral",  # jitter on what the router reads
        "falcon",  # layers that read their dropout from the config
        "xglm",  # layers dropped as a whole
        "biogpt",
        "persimmon",
        "gpt_bigcode",
        "dbrx",
    ],
)
def test_training_mode_computes_what_evaluation_mode_does(family: str) -> None:
    model = families.tiny_model(family)
    expected = logits(model)
    random = [logits(model.train()) for _ in range(2)]
    assert not torch.equal(*random)
    peft = add_lora(model, rank=4)
    assert remove_randomness(model)
    for _ in range(2):
        torch.testing.assert_close(logits(peft.train()), expected, rtol=0, atol=1e-5)
    assert model.training
    torch.testing.assert_close(logits(peft.eval()), expected, rtol=0, atol=1e-5)
    assert remove_randomness(model) is not None  # again does no harm


def test_recomputing_activations_still_works() -> None:
    model = families.tiny_model("falcon")
    remove_randomness(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert len(layers) > families.LAYERS - 1
    model.train()
    assert all(layer.training for layer in layers)
    assert not model.transformer.h[0].self_attention.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_copy_has_a_training_mode_of_its_own() -> None:
    model = families.tiny_model("llama")
    remove_randomness(model)
    twin = copy.deepcopy(model)
    twin.train()
    assert twin.training
    assert not model.training


class _Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def test_a_model_that_is_random_in_evaluation_mode_is_refused_by_name() -> None:
    model = tiny.llama(num_hidden_layers=2)
    model.model.layers[1].mlp.act_fn = _Noisy()
    with pytest.raises(ModelError, match=r"evaluation mode differ by .* first in _Noisy \(model.layers.1.mlp.act_fn\)"):
        remove_randomness(model)


def test_an_encoder_is_refused() -> None:
    check_causal(tiny.llama(num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"BertLMHeadModel: its prediction of a token depends on later tokens"):
        check_causal(families.tiny_model("bert, encoder"))


def test_the_first_loss_with_the_released_dropouts_is_ln_2() -> None:
    """Policy and reference of a fresh adapter: the same function, bit for bit."""
    model: PeftModel = add_lora(families.tiny_model("seed_oss"), rank=4)
    remove_randomness(model.get_base_model())
    policy = logits(model.train())
    with model.disable_adapter():
        assert torch.equal(logits(model.train()), policy)
