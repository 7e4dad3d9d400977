"""Answers from vLLM's offline engine. Each request has its seed, but vLLM does not promise equal answers across
versions or batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preftree.config.prepare import PrepareSettings
from preftree.hardware.device import choose_device
from preftree.hardware.precision import choose_dtype
from preftree.model.generate import Answer
from preftree.model.load import resolve
from preftree.prepare.engines.local import make_chat
from preftree.prepare.generate import Unit


class VllmEngine:
    """Answers units of token ids; vLLM batches them as it likes."""

    def __init__(self, llm: Any, options: dict[str, Any]) -> None:
        self.llm, self.options = llm, options

    def __call__(self, unit: Unit) -> list[Answer]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": request.prompt} for request in unit],
            [SamplingParams(seed=request.seed, **self.options) for request in unit],
            use_tqdm=False,
        )
        first = [output.outputs[0] for output in outputs]
        return [Answer(one.text.strip(), one.finish_reason == "stop") for one in first]


def make(settings: PrepareSettings) -> VllmEngine:
    """Start the engine; it takes the GPUs that it finds."""
    from vllm import LLM

    generate, place = settings.generate, resolve(settings.generate.model_name_or_path or "")
    chat = make_chat(settings)
    dtype = choose_dtype(choose_device(generate.device).value, generate.torch_dtype).value
    llm = LLM(
        model=str(Path(place.place) / place.gguf) if place.gguf else place.place,
        revision=None if place.local else generate.model_revision,
        dtype=str(dtype).removeprefix("torch."),
        download_dir=settings.source.cache_dir,
        trust_remote_code=False,
    )
    options = {
        "temperature": generate.temperature,
        "top_p": generate.top_p,
        "top_k": generate.top_k or -1,
        "max_tokens": generate.max_new_tokens,
        "stop_token_ids": [chat.terminator_id],
    }
    return VllmEngine(llm, options)
