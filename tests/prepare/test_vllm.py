"""The calls that vLLM's engine gets. A contract test: vLLM itself needs a GPU and is not installed here."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preftree.config.prepare import parse_settings
from preftree.hardware.device import Choice
from preftree.model.generate import Answer
from preftree.prepare.engines import vllm as engine_module
from preftree.prepare.generate import Request
from tests.support.prepare import flags


def test_the_calls(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            calls["made"] = options

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            calls["prompts"], calls["params"] = prompts, params
            said = [SimpleNamespace(text=" w30 ", finish_reason=reason) for reason in ("stop", "length")]
            return [SimpleNamespace(outputs=[one]) for one in said]

    stand_in = types.ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, lambda **options: options  # type: ignore[attr-defined]
    stand_in.__spec__ = ModuleSpec("vllm", None)  # so that it counts as installed
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(engine_module, "choose_dtype", lambda device, asked: Choice(torch.float32, f"{device} {asked}"))
    flagged = flags(inputs, tmp_path / "out", torch_dtype="auto", engine="vllm", top_p=0.9)
    engine = engine_module.make(parse_settings(flagged))
    assert engine([Request([5, 6], 11), Request([7], 12)]) == [Answer("w30", True), Answer("w30", False)]
    assert calls["made"]["model"] == str(inputs / "model")
    assert calls["made"]["trust_remote_code"] is False
    assert calls["made"]["dtype"] == "float32"  # the policy of hardware/precision.py, not vLLM's own
    assert calls["prompts"] == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7]}]
    shared = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_tokens": 6, "stop_token_ids": [2]}
    assert calls["params"] == [{"seed": 11, **shared}, {"seed": 12, **shared}]
