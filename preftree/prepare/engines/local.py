"""Answers from a model in this process, by transformers, and the prompts as token ids that vLLM takes, too."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from preftree.config.prepare import GenerateSettings, PrepareSettings
from preftree.data.chat import Chat, Messages
from preftree.data.record import Turn
from preftree.errors import RunError
from preftree.hardware.device import choose_device
from preftree.hardware.precision import choose_dtype
from preftree.model.generate import Answer, Sampling, answer_batch
from preftree.model.load import load_model, load_tokenizer, resolve, resolve_tokenizer
from preftree.prepare.generate import Unit
from preftree.prepare.templates import chat_template


def make_chat(settings: PrepareSettings) -> Chat:
    """The tokenizer with its chat template that renders prompts and counts lengths."""
    generate, source = settings.generate, settings.source
    own = generate.tokenizer_name is None
    place = resolve_tokenizer(generate.tokenizer_name or generate.model_name_or_path or "")
    revision: dict[str, Any] = {"revision": generate.model_revision} if own and place.gguf is None else {}
    tokenizer = load_tokenizer(place, **revision, cache_dir=source.cache_dir, token=source.auth)
    if generate.chat_template:
        tokenizer.chat_template = chat_template(generate.chat_template)
    return Chat(tokenizer)


def question_messages(chat: Chat, system: str, question: str) -> Messages:
    """The conversation to be answered. As in training, an empty system column is no system message."""
    return chat.messages(system or None, [Turn("user", question)])


@dataclasses.dataclass(frozen=True)
class RenderTokens:
    """Messages -> token ids under the chat template, exactly as training encodes a prompt."""

    chat: Chat

    def __call__(self, messages: Messages) -> tuple[list[int], int]:
        text = self.chat.prompt(messages)
        ids = self.chat.prompt_ids(text)
        return ids, len(ids)


@dataclasses.dataclass(frozen=True)
class TransformersEngine:
    """Answers units of token ids with a model that is loaded already."""

    model: Any
    chat: Chat
    sampling: Sampling
    max_new_tokens: int

    def __call__(self, unit: Unit) -> list[Answer]:
        try:
            return answer_batch(
                self.model,
                self.chat.tokenizer,
                [request.prompt for request in unit],
                self.max_new_tokens,
                self.sampling,
                [request.seed for request in unit],
                [self.chat.terminator_id],
            )
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"The accelerator has no memory left for {len(unit)} prompts at once. Give a smaller --batch_size, in a"
                " new folder: batches decide rounding, so a run keeps the ones it began with."
            ) from error


def make(settings: PrepareSettings) -> TransformersEngine:
    """Load the model. Raises ModelError where it cannot be had."""
    generate = settings.generate
    device = choose_device(generate.device).value
    dtype = choose_dtype(device, generate.torch_dtype).value
    place = resolve(generate.model_name_or_path or "")
    revision: dict[str, Any] = {"revision": generate.model_revision} if place.gguf is None else {}
    model = load_model(place, dtype, **revision, cache_dir=settings.source.cache_dir, token=settings.source.auth)
    return TransformersEngine(model.to(device), make_chat(settings), sampling(generate), generate.max_new_tokens)


def sampling(generate: GenerateSettings) -> Sampling:
    """The settings' way of drawing a token."""
    return Sampling(generate.temperature, generate.top_k, generate.top_p)
