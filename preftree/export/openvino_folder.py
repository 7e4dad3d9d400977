"""An OpenVINO folder read back: its tensors' names always, next tokens where the runtime is in this environment."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from preftree.data.encode import EncodedPair
from preftree.errors import ModelError
from preftree.merge.verify import Verified
from preftree.model.load import load_model, resolve

_INPUTS = {"input_ids", "attention_mask"}


def check_openvino(folder: Path, model: Path, pairs: Sequence[EncodedPair]) -> Verified:
    """Compare the likeliest next tokens of an export with the model's, where openvino is installed here.

    Raises:
        ModelError: the folder is no language model, or its next tokens are others.
    """
    names = _input_names(folder / "openvino_model.xml")
    if missing := _INPUTS - names:
        raise ModelError(f"openvino_model.xml has no input {', '.join(sorted(missing))}: it is no language model")
    if find_spec("openvino") is None:
        return Verified(
            "inputs", f"{', '.join(sorted(names))}; tokens were not compared, as openvino is not installed here"
        )
    prompts = [list(pair.prompt_ids) for pair in pairs]
    expected = _torch_tokens(model, prompts)
    found = _openvino_tokens(folder, prompts)
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    if 2 * same < len(prompts):  # weights may be stored in 8 bits, so a tie may fall otherwise
        raise ModelError(f"the likeliest next token is another one for {len(prompts) - same} of {len(prompts)} prompts")
    return Verified("next tokens", f"{same} of {len(prompts)} prompts are continued by the model's own likeliest token")


def _input_names(xml: Path) -> set[str]:
    try:
        root = ElementTree.parse(xml).getroot()
    except (OSError, ElementTree.ParseError) as problem:
        raise ModelError(f"{xml.name} cannot be read back: {problem}") from problem
    return {str(layer.get("name")) for layer in root.iter("layer") if layer.get("type") == "Parameter"}


def _torch_tokens(model: Path, prompts: Sequence[list[int]]) -> list[int]:
    loaded: Any = load_model(resolve(str(model)), torch.float32)
    with torch.no_grad():
        return [int(loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) for ids in prompts]


def _openvino_tokens(folder: Path, prompts: Sequence[list[int]]) -> list[int]:
    import openvino

    compiled: Any = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU")
    found = []
    for ids in prompts:
        request = compiled.create_infer_request()
        given = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        for extra in ("position_ids", "beam_idx"):
            if any(extra in each.get_names() for each in compiled.inputs):
                given[extra] = np.arange(len(ids))[None] if extra == "position_ids" else np.zeros(1, np.int32)
        found.append(int(next(iter(request.infer(given).values()))[0, -1].argmax()))
    return found
