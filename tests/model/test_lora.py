"""Where LoRA goes, and the message when it can go nowhere."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from preftree.errors import ModelError
from preftree.model.lora import add_adapter, add_lora, linear_names, lora_config
from preftree.model.targets import Targets, all_linear
from tests.support import families, tiny

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


def trainable(family: str) -> tuple[PeftModel, Targets]:
    """A tiny model with an adapter of non-zero weights in it, and what was adapted."""
    model = families.tiny_model(family)
    targets = all_linear(model)
    peft = add_adapter(model, lora_config(model, rank=4), targets)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if ".lora_B" in name:
                weight.normal_(0, 0.1)
    return peft, targets


@pytest.mark.parametrize(
    ("family", "parameters", "skipped"),
    [
        ("mixtral", 8, {}),  # stacked experts
        ("deepseek_v3", 6, {}),  # shared experts under the names that PEFT reads as the stacked ones
        ("llama4_text", 8, {"model.layers.*.feed_forward.router": "returns more than its product"}),
        ("phimoe", 8, {"model.layers.*.mlp.router": "returns more than its product"}),
        ("deepseek_v32", 4, {"layers.*.self_attn.indexer.": "no gradient reaches it"}),
        ("recurrent_gemma", 0, {"temporal_block.rg_lru.recurrent_gate_weight": "part of a recurrence"}),
        ("gemma3n_text", 0, {}),  # modifies what a LoRA layer returns in place
        (
            "mamba",
            0,
            {
                "backbone.layers.*.mixer.dt_proj": "without calling it",
                "backbone.layers.*.mixer.out_proj": "PEFT refuses",
            },
        ),
    ],
)
def test_all_that_can_be_adapted_is_adapted_and_the_rest_is_named(family, parameters, skipped) -> None:
    peft, targets = trainable(family)
    assert len(targets.parameters) == parameters
    notes = targets.notes()
    assert len(notes) == len(skipped)
    assert all(any(name in note and reason in note for note in notes) for name, reason in skipped.items())
    base = peft.get_base_model()
    linear = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    assert linear.issuperset(targets.modules)
    peft(input_ids=torch.randint(5, 97, (1, 60)), use_cache=False).logits.square().mean().backward()
    assert all(bool(weight.grad.abs().sum() > 0) for weight in tiny.trained(peft).values())


def test_what_peft_cannot_adapt_is_one_message() -> None:
    with pytest.raises(ModelError, match=r"PEFT cannot adapt MambaForCausalLM as asked: .*out_proj"):
        add_lora(families.tiny_model("mamba"), target_modules=["out_proj"])


def test_a_model_without_anything_to_adapt_is_one_message() -> None:
    """Reformer's reversible layers run their own backward pass, which no gradient of a layer's output comes out of."""
    with pytest.raises(
        ModelError, match=r"Reformer.* has no linear layer that LoRA can adapt; not adapted: .*gradient"
    ):
        add_lora(families.tiny_model("reformer"))


def test_dropout_leaves_out_stacked_experts_and_says_so() -> None:
    model = families.tiny_model("mixtral")
    targets = all_linear(model, dropout=0.1)
    assert not targets.parameters
    assert ["PEFT cannot apply --lora_dropout" in note for note in targets.notes()] == [True]
    assert targets.skipped_weights == sum(w.numel() for n, w in model.named_parameters() if ".experts." in n)
    add_adapter(model, lora_config(model, dropout=0.1), targets)
