"""A tiny random model of any causal-LM family in transformers, made from the family's own default config.

Every size is replaced by a small one under its name; lists with one entry per layer are cut to the number of layers
with all of their distinct entries kept, so that a model has every kind of layer that its family has. Dropout and
router noise are on, windows are shorter than the sequences they are tried with, weights are large enough that a wrong
mask cannot hide, and all of them can be represented in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
LAYERS = 4
WINDOW = 32
#: Positions at which long-context rotary scaling changes over, and a sparse attention's number of keys.
SWITCH = 64
NOISE = 0.1

_NAMES: list[tuple[int, str]] = [
    (
        VOCABULARY,
        """vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size encoder_hash_byte_group_vocab
        audio_vocab_size pronunciation_vocab_size shape_vocab_size""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks n_blocks
        num_layers_per_stack""",
    ),
    (
        64,
        """hidden_size d_model n_embd emb_dim embedding_size embedding_dim embed_dim word_embed_proj_dim lru_width
        input_embedding_size output_embedding_size attention_hidden_size router_hidden_size linear_hidden_size
        ple_embed_dim pronunciation_embed_dim shape_embed_dim cross_attention_hidden_size hc_lowrank
        mamba_d_ssm dim_model_base""",
    ),
    (
        96,
        """intermediate_size intermediate_size_mlp moe_intermediate_size shared_expert_intermediate_size n_inner d_inner
        ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff ffn_hidden_size dense_intermediate_size
        expert_ffn_hidden_size shared_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size prefix_dense_intermediate_size feed_forward_size hidden_dim""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads mamba_num_heads zero_expert_num
        index_n_heads num_query_groups indexer_n_heads altup_num_inputs""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads num_experts_per_tok num_experts_per_token
        moe_topk moe_k top_k_experts n_shared_experts num_shared_experts moe_num_shared_experts linear_num_key_heads
        mamba_n_groups n_groups n_group num_expert_group encoder_layers num_encoder_layers no_rope_layer_interval
        layer_group_size attn_layer_period expert_layer_period num_kv_shared_layers max_window_layers
        global_attn_every_n_layers sliding_window_pattern _sliding_window_pattern
        n_layers_per_attn_res_block H_cycles L_cycles mamba_ngroups n_mamba_heads index_block_size""",
    ),
    (
        1,
        """num_dense_layers first_k_dense_replace topk_group moe_layer_start_index attn_layer_offset num_mem_blocks
        indexer_kv_heads num_hash_layers""",
    ),
    (
        16,
        """head_dim kv_channels qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        mamba_head_dim mamba_d_head mamba_headdim kv_lora_rank q_lora_rank o_lora_rank index_head_dim indexer_head_dim
        swa_head_dim attention_head_size dim_head d_head state_size ssm_state_size mamba_d_state mamba_chunk_size
        chunk_size linear_chunk_size laurel_rank hidden_size_per_layer_input adapter_rank time_step_rank mamba_dt_rank
        rel_extent moe_latent_size gated_norm_rank""",
    ),
    (8, "qk_rope_head_dim rotary_dim d_rel mamba_n_heads swa_v_head_dim"),
    (24, "qk_head_dim"),
    (
        WINDOW,
        """sliding_window window_size attention_window_size local_attention sliding_window_size keep_window_size
        attention_window local_attention_window_len""",
    ),
    (SWITCH, "index_topk attention_chunk_size indexer_budget floor_scale"),
    (
        512,
        """max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length
        position_bias_max_distance""",
    ),
]
_SIZES = {name: size for size, names in _NAMES for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_INDEXER = {
    "indexer_budget": SWITCH,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}

_DOTS3_WINDOW = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DOTS3 = {"per_layer_config": {1: _DOTS3_WINDOW, 3: _DOTS3_WINDOW}}

#: What these rules cannot know, by family.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "diffllama": {"attention_dropout": 0.0},  # refuses any other value
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "layer_types": _SLIDING},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2": {"use_sliding_window": True},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False, "hash_seed": 0},  # else it draws its hashes in every pass
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "qwen2_moe": {"use_sliding_window": True},
    "qwen3": {"use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True},
    "phi3": {"sliding_window": WINDOW},
}

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": SWITCH,
    "factor": 512 / SWITCH,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

#: Models whose config decides what kind of model they are: name → (family, fields).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, encoder": ("bert", {"is_decoder": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {"multi_query": False}),
    "llama, dynamic NTK": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": SWITCH}),
    "phi3, longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": SWITCH}),
}


def all_families() -> list[str]:
    """The families of transformers' causal language models, and our variants of some."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def tiny_config(family: str, noise: float = NOISE) -> PreTrainedConfig:
    """A config of `family` with every size small; `noise` for all dropout probabilities and router jitter."""
    model_type, own = VARIANTS.get(family, (family, {}))
    return _shrunk(CONFIG_MAPPING[model_type](), noise, {**_OWN.get(model_type, {}), **own})


def tiny_model(family: str, seed: int = 0, noise: float = NOISE) -> PreTrainedModel:
    """A random float32 model of `family` in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, noise), trust_remote_code=False, dtype=torch.float32)
    enliven(model)
    return model.eval()


def enliven(model: nn.Module) -> None:
    """Weights far from the usual 0.02, where all positions look alike; all exact in bfloat16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith(("A_log", "dt_bias")):
                parameter.normal_(0.0, min(0.3, 1.5 * parameter.shape[-1] ** -0.5))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer).bfloat16())


def _shrunk(config: PreTrainedConfig, noise: float, own: Mapping[str, Any]) -> PreTrainedConfig:
    per_layer = [getattr(config, name, None) or [] for name in ("layer_types", "layers_block_type")]
    layers = max(map(len, per_layer))
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunk(value, noise, own.get(name, {}))
        elif name in ("head_dim", "num_key_value_heads") and "kv_lora_rank" in vars(config):  # latent attention
            fields[name] = _SIZES["qk_rope_head_dim" if name == "head_dim" else "num_attention_heads"]
        elif name in _SIZES and value is not None and not isinstance(value, list | dict):
            fields[name] = _SIZES[name]
        elif name in ("is_decoder", "causal"):
            fields[name] = True
        elif name.endswith("_token_id") and isinstance(value, int | list):
            fields[name] = _TOKENS.get(name, 3)
        elif ("drop" in name or "jitter" in name) and isinstance(value, float | int) and not isinstance(value, bool):
            fields[name] = noise
        elif isinstance(value, list) and len(value) == layers > LAYERS:
            distinct = list(dict.fromkeys(map(_hashable, value)))
            if len(distinct) <= LAYERS:
                fields[name] = [distinct[i % len(distinct)] for i in range(LAYERS)]
    fields.update((name, value) for name, value in own.items() if not isinstance(fields.get(name), PreTrainedConfig))
    return type(config)(**fields)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
