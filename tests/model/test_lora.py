"""Where LoRA goes, and the message when it can go nowhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from preftree.errors import ModelError
from preftree.model.load import disable_dropout
from preftree.model.lora import add_lora, linear_names
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(model: nn.Module) -> set[str]:
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tiny.trained(model)}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("mpt", {"Wqkv", "out_proj", "up_proj", "down_proj"}),
    ],
)
def test_all_linear_is_everything_but_the_head(family: str, names: set[str]) -> None:
    model = add_lora(tiny.FAMILIES[family](), rank=4, alpha=8)
    assert adapted(model) == names
    assert all(".lora_" in name for name in tiny.trained(model))
    assert model.peft_config["default"].lora_alpha == 8
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_a_fresh_adapter_is_the_model_itself() -> None:
    base, ids = tiny.llama(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = add_lora(base, rank=4)(input_ids=ids).logits
    assert torch.equal(before, after)


def test_dotted_targets() -> None:
    model = add_lora(tiny.llama(), rank=4, target_modules=["layers.1.self_attn.q_proj", "v_proj"])
    places = {name.split(".lora_")[0].split("layers.")[1] for name in tiny.trained(model)}
    assert places == {"1.self_attn.q_proj", *(f"{i}.self_attn.v_proj" for i in range(4))}


def test_a_target_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(ModelError) as caught:
        add_lora(tiny.llama(), target_modules=["q_proj", "v_porj", "Wqkv"])
    message = str(caught.value)
    assert message.startswith("--lora_target_modules: v_porj, Wqkv matches no module of LlamaForCausalLM.")
    assert "Did you mean v_proj" in message
    assert "q_proj (4)" in message
    assert "lm_head (1)" in message


def test_a_part_of_a_name_is_no_match() -> None:
    with pytest.raises(ModelError, match="proj matches no module"):
        add_lora(tiny.llama(), target_modules=["proj"])


def test_linear_names_count_gpt2s_transposed_layers() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    assert linear_names(model) == {"c_attn": 2, "c_proj": 4, "c_fc": 2, "lm_head": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny.llama(attention_dropout=0.1),
        lambda: tiny.gpt_neox(attention_dropout=0.1, hidden_dropout=0.2),
        lambda: tiny.phi3(attention_dropout=0.1, resid_pdrop=0.2, embd_pdrop=0.3),
    ],
    ids=["llama", "gpt_neox", "phi3"],
)
def test_no_dropout_is_left(make) -> None:  # type: ignore[no-untyped-def]
    model = tiny.with_lora(make(), dropout=0.05).train()
    ids = torch.randint(3, tiny.VOCABULARY, (1, 30))
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        assert disable_dropout(model) > 0
        assert disable_dropout(model) == 0
        trained = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, trained)
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, trained)
