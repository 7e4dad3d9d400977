"""Answers of a model to prompts, in batches: greedy for measuring, sampled for making the rejected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """What the model said, and whether it ended by itself rather than at the token limit."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the seed makes one batch repeatable on the same machine and software."""

    seed: int
    temperature: float = 0.7
    top_k: int = 20


def greedy_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    systems: Sequence[str] | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The most likely answer to each question, in the order of the questions.

    `systems` has one system message a question; an empty one leaves the turn to the chat template.
    Prompts of similar length share a batch, so that little is padded. An answer ends at the model's
    end token or after `max_new_tokens`. `progress` is called with (prompts done, prompts in all).
    The model may be a PEFT model; its training mode is restored.
    """
    prompts = render_prompts(tokenizer, questions, systems)
    texts = [""] * len(prompts)
    order = by_length(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        answers = answer_batch(model, tokenizer, [prompts[row] for row in rows], max_new_tokens)
        for row, answer in zip(rows, answers, strict=True):
            texts[row] = answer.text
        if progress is not None:
            progress(start + len(rows), len(order))
    return texts


def render_prompts(
    tokenizer: Any,
    questions: Sequence[str],
    systems: Sequence[str] | None = None,
    turns_before: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Each question through the chat template, with the assistant's header at the end.

    `turns_before` are (question, answer) pairs that stand before every question.
    """
    prompts = []
    for question, system in zip(questions, systems or [""] * len(questions), strict=True):
        messages = [{"role": "system", "content": system}] if system else []
        for asked, answered in turns_before:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return prompts


def by_length(prompts: Sequence[str]) -> list[int]:
    """Row numbers from the longest prompt to the shortest: a lack of memory shows at once, not at the end."""
    return sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))


@torch.no_grad()
def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """One batch of rendered prompts answered together; greedy unless `sampling` is given.

    A seeded batch leaves torch's global CPU random state as it found it.
    """
    with (
        _ready_to_generate(model, tokenizer),
        torch.random.fork_rng(devices=[], enabled=sampling is not None),
    ):
        # The rendered text already holds every special token: adding them again would double the BOS.
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        options: dict[str, Any] = {"do_sample": False}
        if sampling is not None:
            torch.manual_seed(sampling.seed)
            # top_k, not top_p: that one sorts the whole vocabulary for each token, half of the time on a CPU.
            options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options)
    continuations = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_read(tokenizer, ids) for ids in continuations]


def _read(tokenizer: Any, ids: list[int]) -> Answer:
    finished = tokenizer.eos_token_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), finished)


@contextmanager
def _ready_to_generate(model: Any, tokenizer: Any) -> Iterator[None]:
    """Evaluation mode and left padding with a pad token, for as long as the block lasts."""
    training, side, pad = model.training, tokenizer.padding_side, tokenizer.pad_token
    model.eval()
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        model.train(training)
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = None
