"""Batched generation: greedy, or sampled with one random stream per row.

The tokens sampled for a row depend on its own seed only: not on the other rows, their order, or torch's global
random state. Floating-point rounding, however, depends on the batch's shape, and can decide a draw that lies right
at the boundary between two tokens. Callers that promise identical bytes therefore keep batches fixed as well.

Shapes: B rows, T new tokens, V vocabulary, K candidates (top-k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from preftree.model.score import evaluating

#: Nearly every nucleus lies within this many tokens; sorting a whole vocabulary takes ten times as long.
_NUCLEUS_CANDIDATES = 1024


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: logits / `temperature`, then top-k (0: all tokens), then the smallest set of the most
    probable remaining tokens whose probability reaches `top_p`. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated: its longest length, sampling, and stop tokens beside the model's own."""

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, whether it ended with a stop token rather than at the token limit, the reason
    where there is none (a server refused the prompt), and its token ids with the stop token, where they are known."""

    text: str
    finished: bool
    failure: str = ""
    ids: tuple[int, ...] = field(default=(), compare=False)


def by_length(lengths: Sequence[int]) -> list[int]:
    """Row indices from longest to shortest: little padding, and running out of memory happens at the start."""
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] = (),
    stops: Sequence[int] = (),
) -> list[Answer]:
    """Generate an answer to each prompt (token ids) in one batch, in the order of the prompts.

    Args:
        model: a causal language model, PEFT models included; its training mode is restored.
        seeds: one per prompt; required unless sampling is greedy.
        stops: stop tokens in addition to the EOS tokens of the tokenizer and the model.
    """
    return _answer(model, tokenizer, prompts, Decoding(max_new_tokens, sampling, tuple(stops)), seeds)


def streamed_answer(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    decoding: Decoding,
    seed: int,
    show: Callable[[str], None],
) -> Answer:
    """`answer_batch` of one prompt that calls `show` with the text so far after each token."""
    return _answer(model, tokenizer, [prompt], decoding, [seed], _TextStreamer(tokenizer, len(prompt), show))[0]


class _TextStreamer(BaseStreamer):
    """Passes on the text of one row as it grows."""

    def __init__(self, tokenizer: Any, skip: int, show: Callable[[str], None]) -> None:
        self.tokenizer, self.skip, self.show = tokenizer, skip, show
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then each token."""
        self.ids += value.flatten().tolist()
        if len(self.ids) > self.skip:
            text = self.tokenizer.decode(self.ids[self.skip :], skip_special_tokens=True)
            self.show(text.rstrip("\ufffd").lstrip())  # an incomplete character is held back

    def end(self) -> None:
        """There is nothing left to pass on."""


def _answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int],
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    sampling, max_new_tokens = decoding.sampling, decoding.max_new_tokens
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids_BL = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
    mask_BL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    ends = _end_tokens(model, tokenizer, decoding.stops)
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(_RowSampler(sampling, uniforms(seeds, max_new_tokens).to(model.device), width))
    with evaluating(model):
        output_BL = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            generation_config=_config(max_new_tokens, pad, ends),
            logits_processor=processors,
            streamer=streamer,
        )
    return [_read(tokenizer, ids, ends) for ids in output_BL[:, width:].tolist()]


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """An answer to each prompt (token ids), in the order of the prompts; prompts of similar length share a batch.

    Args:
        seed: of the first prompt; each prompt has a random stream of its own.
        progress: called with (prompts done, total prompts).
    """
    found: dict[int, Answer] = {}
    order = by_length([len(ids) for ids in prompts])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        seeds = [seed + row for row in rows]
        found.update(zip(rows, _answer(model, tokenizer, [prompts[row] for row in rows], decoding, seeds), strict=True))
        progress(len(found), len(prompts))
    return [found[row] for row in range(len(prompts))]


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) per seed, (len(seeds), count) in float64."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Sample one token per row by inverting the CDF of the kept tokens at its uniform number, (B,).

    The CDF runs over tokens by descending probability, or by token id where none is cut off, which needs no sorting.
    """
    scaled_BV = logits_BV.double() / sampling.temperature
    vocabulary = scaled_BV.shape[1]
    count = min(sampling.top_k or vocabulary, vocabulary)
    if count == vocabulary and sampling.top_p >= 1:
        token_B1 = _invert_cdf(scaled_BV.softmax(-1).cumsum(-1), uniform_B, torch.full_like(uniform_B, vocabulary - 1))
        return token_B1[:, 0]
    candidates = min(count, _NUCLEUS_CANDIDATES) if sampling.top_p < 1 else count
    top_BK, token_BK = torch.topk(scaled_BV, candidates)
    kept_BV = scaled_BV if count == vocabulary else top_BK if candidates == count else torch.topk(scaled_BV, count)[0]
    total_B1 = kept_BV.logsumexp(-1, keepdim=True)
    sum_BK = (top_BK - total_B1).exp().cumsum(-1)
    if candidates < count and bool((sum_BK[:, -1] < sampling.top_p).any()):
        top_BK, token_BK = torch.topk(scaled_BV, count)
        sum_BK = (top_BK - total_B1).exp().cumsum(-1)
    last_B = (sum_BK < sampling.top_p).sum(-1) if sampling.top_p < 1 else torch.full_like(uniform_B, count)
    return token_BK.gather(1, _invert_cdf(sum_BK, uniform_B, last_B))[:, 0]


def _invert_cdf(sum_BK: Tensor, uniform_B: Tensor, last_B: Tensor) -> Tensor:
    """Index of the first cumulative sum above uniform × (the sum up to `last`), (B, 1)."""
    last_B1 = last_B.long()[:, None].clamp(max=sum_BK.shape[1] - 1)
    target_B1 = uniform_B[:, None] * sum_BK.gather(1, last_B1)
    return torch.searchsorted(sum_BK, target_B1, right=True).minimum(last_B1)


class _RowSampler(LogitsProcessor):
    """Samples each row's token and masks all others, so that greedy search has to take it."""

    def __init__(self, sampling: Sampling, uniform_BT: Tensor, prompt_width: int) -> None:
        self.sampling, self.uniform_BT, self.prompt_width = sampling, uniform_BT, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        token_B = draw(scores, self.uniform_BT[:, step], self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


def _config(max_new_tokens: int, pad: int, ends: list[int]) -> GenerationConfig:
    # Every field that changes logits is set: an omitted one would come from the model's generation_config.json.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )


def _end_tokens(model: Any, tokenizer: Any, stops: Sequence[int]) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in (*stops, tokenizer.eos_token_id, *own) if token is not None})


def _read(tokenizer: Any, ids: list[int], ends: list[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    return Answer(text, end is not None, ids=tuple(ids if end is None else ids[: end + 1]))
