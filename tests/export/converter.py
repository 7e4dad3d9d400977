"""A stand-in for llama.cpp's converter that takes the same words, for tiny Llama models; CONVERTER_FAULT spoils it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs side by side, as llama.cpp has them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype")
    given = parser.parse_args()
    fault = os.environ.get("CONVERTER_FAULT", "")
    if fault == "fails":
        print("KeyError: 'rope_parameters'", file=sys.stderr)
        return 3
    config = json.loads((given.model / "config.json").read_text())
    tokens = json.loads((given.model / "tokenizer.json").read_text())["model"]["vocab"]
    writer = GGUFWriter(given.outfile, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokens, key=tokens.get))
    writer.add_eos_token_id(tokens["<turn>" if fault == "eos" else "<eos>"])
    template = (given.model / "chat_template.jinja").read_text()
    writer.add_chat_template(template.replace("assistant", "bot") if fault == "template" else template)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in load_file(given.model / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in _OUTER:
            own = _OUTER[stem]
        else:
            _, _, number, inner = stem.split(".", 3)
            own = f"blk.{number}.{_NAMES[inner]}"
            weight = _interleaved(weight, heads[_NAMES[inner]]) if _NAMES[inner] in heads else weight
        if fault == "weights" and own == "blk.0.ffn_up":
            weight = 1.5 * weight
        writer.add_tensor(f"{own}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
