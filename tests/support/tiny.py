"""Tiny random models of real architectures, with weights so large that a wrong mask cannot hide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.forest import Forest
from preftree.model.lora import add_lora

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = 5  # shorter than nearly every path of the tests' forests


def _model(kind: str, seed: int, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**fields)
    name = f"{kind.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the usual 0.02, where all positions look alike and a wrong mask moves little.
            parameter.normal_(0.0, 0.3)
    return model.eval()


def llama(seed: int = 0, **more: Any) -> PreTrainedModel:
    """Heads of 16: the compiled kernels take whole vectors, which are that long where they are longest."""
    return _model("Llama", seed, **{**_SIZES, "head_dim": 16, **more})


def mistral(seed: int = 0, **more: Any) -> PreTrainedModel:
    return _model("Mistral", seed, **{**_SIZES, "head_dim": 8, "sliding_window": _WINDOW, **more})


def qwen2(seed: int = 0, **more: Any) -> PreTrainedModel:
    return _model("Qwen2", seed, **{**_SIZES, **more})


def qwen3(seed: int = 0, **more: Any) -> PreTrainedModel:
    return _model("Qwen3", seed, **{**_SIZES, "head_dim": 8, **more})


def gemma2(seed: int = 0, **more: Any) -> PreTrainedModel:
    own = {
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": _WINDOW,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    }
    return _model("Gemma2", seed, **{**_SIZES, **own, **more})


def gemma3(seed: int = 0, **more: Any) -> PreTrainedModel:
    own = {
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": _WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    }
    torch.manual_seed(seed)
    return _model("Gemma3Text", seed, **{**_SIZES, **own, **more})


def phi3(seed: int = 0, **more: Any) -> PreTrainedModel:
    return _model("Phi3", seed, **{**_SIZES, **more})


def phi3_window(seed: int = 0, **more: Any) -> PreTrainedModel:
    return phi3(seed, sliding_window=_WINDOW, **more)


def gpt_neox(seed: int = 0, **more: Any) -> PreTrainedModel:
    sizes = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
    return _model("GPTNeoX", seed, **{**sizes, "rotary_pct": 0.5, **more})


def mpt(seed: int = 0, *, heads: int = 4, head_dim: int = 8, **attention: Any) -> PreTrainedModel:
    own = {
        "vocab_size": VOCABULARY,
        "d_model": head_dim * heads,
        "n_heads": heads,
        "n_layers": 4,
        "expansion_ratio": 2,
        "max_seq_len": 256,
        "attn_config": {"alibi": True, **attention},
    }
    return _model("Mpt", seed, **own)


def mpt_six_heads(seed: int = 0) -> PreTrainedModel:
    return mpt(seed, heads=6)


def mpt_clipped(seed: int = 0) -> PreTrainedModel:
    return mpt(seed, clip_qkv=0.8)


#: Every family that the token tree is promised for.
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "mistral-window": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "phi3-window": phi3_window,
    "gpt_neox": gpt_neox,
    "mpt": mpt,
    "mpt-6-heads": mpt_six_heads,
    "mpt-clip_qkv": mpt_clipped,
}


def for_kernels(family: str) -> PreTrainedModel:
    """A model of the family whose heads are as long as the compiled kernels' vectors: shorter ones go to torch."""
    return FAMILIES[family](head_dim=16)


def with_lora(model: PreTrainedModel, seed: int = 1, **options: Any) -> PeftModel:
    """`model` with LoRA whose second matrices are not zero, so that every LoRA weight has a gradient."""
    dtype = model.dtype
    adapted = add_lora(model, **{"rank": 4, "alpha": 8, **options})
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return adapted


def checkpoint(model: PeftModel) -> None:
    """Switch activation checkpointing on, under the name that this transformers has for it."""
    inner = model.get_base_model()
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable({"use_reentrant": False})
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": False})


def plain_logprobs(model: nn.Module, forest: Forest) -> Tensor:
    """Log-probs of the scored tokens from the model's own logits, one unpadded sequence at a time."""
    parts = []
    for sequence, length in zip(forest.unrolled(), forest.leaf_lengths, strict=True):
        logits_NV = model(input_ids=sequence[None], use_cache=False).logits[0]
        logprobs_NV = torch.log_softmax(logits_NV.double(), dim=-1)
        first = len(sequence) - length
        parts += [logprobs_NV[place - 1, sequence[place]] for place in range(first, len(sequence))]
    return torch.stack(parts)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, token_S: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of a random weighting of log-probs with respect to everything that is trained."""
    weight_S = torch.randn(token_S.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parameters = trained(model)
    loss = (token_S * weight_S.to(token_S.dtype)).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, in units of that gradient's largest entry."""
    assert found.keys() == expected.keys()
    assert found
    worst = 0.0
    for name, want in expected.items():
        scale = float(want.abs().max())
        assert scale > 0, f"{name} has no gradient, so nothing is compared"
        worst = max(worst, float((found[name] - want).abs().max()) / scale)
    return worst


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention for a while, as an oracle; families without that switch keep their one."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def word_tokenizer(template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose words are their ids: `w17` is token 17; 0 to 4 are special."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<turn>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>"],
    )
    fast.chat_template = template
    return fast
