"""GGUF by llama.cpp's own converter, read back: metadata with gguf, weights with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from gguf import GGUFReader

from preftree.data.chat import Chat
from preftree.data.encode import EncodedPair
from preftree.errors import ModelError
from preftree.export.converters import convert
from preftree.merge.verify import BOUNDS, Verified, compare_logprobs, pair_scores
from preftree.model.load import load_gguf, load_model, resolve

#: Precision of a file -> nats per token by which an answer's log-prob may differ.
_BOUNDS = {
    "f32": BOUNDS[torch.float32],
    "f16": BOUNDS[torch.float16],
    "bf16": BOUNDS[torch.bfloat16],
    "q8_0": BOUNDS[torch.bfloat16],  # blocks of 32 weights with 8 bits each: about bfloat16's rounding
}


def write_gguf(converter: Sequence[str], model: Path, target: Path, kind: str) -> None:
    """Convert a model folder. Raises RunError where the converter fails."""
    convert([*converter, str(model), "--outfile", str(target), "--outtype", kind], target)


def check_gguf(file: Path, chat: Chat, ends: Sequence[int]) -> list[Verified]:
    """Compare a file's metadata with the tokenizer's. Raises ModelError with the first thing that differs."""
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError) as problem:
        raise ModelError(f"{file.name} cannot be read back: {problem}") from problem
    template = chat.tokenizer.chat_template
    if template and fields.get("tokenizer.chat_template") != template:
        raise ModelError(f"{file.name} has another chat template than the model (template)")
    end = fields.get("tokenizer.ggml.eos_token_id")
    if end is None or end not in ends:
        raise ModelError(f"{file.name} ends answers at token {end}, and the model at {list(ends)} (eos)")
    tensors = f"{len(reader.tensors)} tensors of {fields.get('general.architecture')}"
    return [
        Verified("metadata", tensors),
        Verified("template", "the model's own, to the character" if template else "the model has none"),
        Verified("eos", str(chat.tokenizer.convert_ids_to_tokens(int(end)))),
    ]


def check_gguf_weights(file: Path, model: Path, pairs: Sequence[EncodedPair], kind: str) -> Verified:
    """Compare log-probs of answers under the file, dequantized by transformers, with those under the model.

    Raises:
        VerificationError: they differ by more than the precision's bound.
    """
    try:
        read = load_gguf(file)
    except ModelError as problem:
        return Verified("log-probs", f"not compared, transformers cannot read this file ({problem})")
    expected = pair_scores(load_model(resolve(str(model)), torch.float32), pairs)
    return compare_logprobs(expected, pair_scores(read, pairs), pairs, _BOUNDS[kind], kind)
