"""Random weights in the shapes of real models, and token ids of Orca pairs' lengths: what GPU benchmarks measure on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

#: Prompt, chosen and rejected tokens of 48 Orca pairs, evenly over 180 sorted by size (SmolLM2's tokenizer, 512 + 512).
# fmt: off
LENGTHS = (
    (96, 71, 97), (182, 15, 122), (186, 78, 102), (113, 2, 274), (92, 153, 155), (98, 134, 183), (89, 151, 207),
    (97, 29, 334), (306, 47, 119), (98, 97, 282), (257, 2, 236), (100, 158, 246), (101, 110, 312), (199, 259, 74),
    (74, 128, 341), (104, 71, 382), (146, 127, 288), (98, 246, 232), (99, 224, 262), (512, 9, 82), (512, 13, 85),
    (420, 86, 116), (512, 30, 88), (138, 73, 441), (98, 245, 321), (109, 340, 225), (97, 183, 413), (512, 81, 109),
    (92, 448, 168), (125, 260, 328), (471, 27, 227), (127, 100, 508), (202, 229, 318), (76, 276, 413), (481, 154, 183),
    (118, 330, 388), (512, 221, 114), (90, 419, 357), (101, 92, 690), (66, 269, 562), (170, 223, 524), (89, 319, 531),
    (160, 372, 509), (423, 221, 442), (194, 402, 511), (99, 431, 686), (80, 559, 684), (105, 700, 727),
)
# fmt: on
#: Prompt, chosen and rejected tokens of the shapes named "long".
LONG = (4096, 256, 256)
_TINY: tuple[str, dict[str, Any]] = (
    "Llama",
    {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "Llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-2-7b": (
        "Llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
    "smollm2-1.7b-long": (
        "Llama",
        {
            "vocab_size": 49152,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "mpt-7b": ("Mpt", {"vocab_size": 50432, "d_model": 4096, "n_heads": 32, "n_layers": 32, "max_seq_len": 2048}),
    "tiny-long": _TINY,
    "tiny-mpt": ("Mpt", {"vocab_size": 300, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048}),
    "tiny": _TINY,
}  # fmt: skip


@dataclass(frozen=True)
class Ids:
    """One pair's token ids."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()
    ranks: tuple[int, ...] = (1, 2)


def make_pairs(count: int, vocabulary: int, shorter: int = 1, long: bool = False) -> list[Ids]:
    """Random ids in the lengths of `LENGTHS` (or `LONG`), in an order fixed by a seed; lengths divided by `shorter`."""
    draw = random.Random(0)
    lengths = [LONG] if long else list(LENGTHS)
    draw.shuffle(lengths)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(-(-length // shorter)))

    return [Ids(*(ids(length) for length in lengths[i % len(lengths)])) for i in range(count)]


def pairs_of(shape: str, count: int) -> list[Ids]:
    """The pairs that a shape is measured on."""
    long = shape.endswith("long")
    shorter = (32 if long else 8) if shape.startswith("tiny") else 1
    return make_pairs(count, SHAPES[shape][1]["vocab_size"], shorter, long)


def make_model(shape: str, device: str) -> Any:
    """A model with random weights, with LoRA r=16 on every linear layer; bfloat16, but float32 on a CPU."""
    import torch
    import transformers

    from preftree.model.lora import add_lora

    kind, fields = SHAPES[shape]
    config = getattr(transformers, f"{kind}Config")(**fields)
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return add_lora(model, rank=16, alpha=16)
