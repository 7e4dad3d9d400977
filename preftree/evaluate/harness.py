"""lm-eval's model class over token trees: `preftree` beside `hf`, the same numbers for less work.

It is lm-eval's own `HFLM` in all that touches text: chat templates, BOS, empty contexts, what a too long request
loses on its left, generation. Only the scoring of token ids is another: all requests at once, as one stream in
which every common beginning is computed once (`model.stream`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import PreTrainedModel

from preftree.errors import ModelError, SettingsError, did_you_mean
from preftree.evaluate.cache import RequestCache, request_key, sampled
from preftree.forest import ScoreRequest
from preftree.forest.stream import split_paths
from preftree.hardware.device import kind_of, require_device
from preftree.hardware.precision import choose_dtype
from preftree.io.progress import Progress
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.model.lora import load_adapter
from preftree.model.score import attach
from preftree.model.stream import RequestScore, can_stream, score_requests

#: Tokens of a forward pass: enough for full-speed matrix products, few enough to need less memory than logits do.
BUDGET = {"cpu": 2048}
BUDGET_ELSEWHERE = 16384

#: Arguments of `HFLM` that mean the same here. Others would be dropped by it without a word: the model comes loaded.
_PASSED_ON = {
    "add_bos_token", "backend", "batch_size", "chat_template_args", "enable_thinking", "logits_cache", "max_batch_size",
    "max_length", "prefix_token_id", "think_end_token", "tokenizer", "truncation",
}  # fmt: skip
_KNOWN = _PASSED_ON | {"pretrained", "peft", "dtype", "device", "on_truncation", "revision", "tokens_per_forest"}


@register_model("preftree")
class PreftreeLM(HFLM):
    """`lm_eval.models.huggingface.HFLM` whose log-likelihoods come from token trees.

    Args:
        pretrained: a folder, a hub id, `smollm2`, or a loaded transformers model.
        peft: folder of a PEFT adapter on it.
        dtype: float32, bfloat16, float16, or auto: what is fast on the device (see `precision.choose_dtype`).
        device: cpu, cuda, cuda:0, …; None takes a GPU if there is one.
        revision: of the model on the hub.
        tokens_per_forest: fresh tokens of a forward pass.
        on_truncation: "warn" (lm-eval's way) or "refuse" requests that are longer than the model's positions.
        options: those of `HFLM` that concern text (`_PASSED_ON`).

    Raises:
        SettingsError: an option of `HFLM` that has no meaning here.
        DeviceError: `device` is not there.
        ModelError: the model or adapter cannot be loaded, or do not fit.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        peft: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        tokens_per_forest: int | None = None,
        on_truncation: str = "warn",
        **options: Any,
    ) -> None:
        _check_options(options)
        self.console = Console(soft_wrap=True, stderr=True)
        self.processes = PartialState(cpu=kind_of(device or "") == "cpu" or not torch.cuda.is_available())
        if isinstance(pretrained, str):
            device = device or str(self.processes.device)
            require_device(device)
            source = resolve(pretrained)
            extra = {"revision": revision} if revision else {}
            options.setdefault("tokenizer", load_tokenizer(source, **extra))
            choice = choose_dtype(device, dtype)
            self._say(f"precision  {choice}")
            model: Any = load_model(source, choice.value, **extra).to(device)
        else:
            model = pretrained
        if peft:
            model = load_adapter(model, peft)
        model.requires_grad_(False)  # frozen weights may go through fused kernels
        with _without_warnings():
            super().__init__(pretrained=model, dtype=None, **options)
        self.pretrained, self.peft, self.revision = str(pretrained), peft, revision
        self.budget = int(tokens_per_forest or BUDGET.get(self.device.type, BUDGET_ELSEWHERE))
        self.cache: RequestCache | None = None
        self.on_truncation, self.truncated = on_truncation, 0
        self._encoded: dict[str, list[int]] = {}
        self.scorer = attach(self.model)
        self.streams, reason = can_stream(self.scorer)
        way = f"token trees, {self.budget} tokens a forward pass" if self.streams else "lm-eval's own batches"
        self._say(f"scoring    {way}: {reason}")

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the model and the request's text."""
        names = ("add_bos_token", "prefix_token_id", "max_length", "truncation", "think_end_token", "enable_thinking")
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        return {name: getattr(self, name) for name in names} | {"streams": self.streams, "tokenizer": words}

    @property
    def max_length(self) -> int:
        """See `HFLM.max_length`; MPT's positions have a name of their own, and its code fails beyond them."""
        own = getattr(self.model.config, "max_seq_len", None)
        length = int(super().max_length)
        return min(length, own) if own and not self._max_length else length

    def remember(self, cache: RequestCache) -> None:
        """Take answers from `cache`, and put new ones there as they come."""
        self.cache = cache
        self.set_cache_hook(cache)  # type: ignore[arg-type]
        self.processes.wait_for_everyone()  # or a process could read what another one has written by now

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM.loglikelihood`."""
        return self._remembered("loglikelihood", requests, self._loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `lm_eval.api.model.LM.loglikelihood_rolling`."""
        return self._remembered("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `lm_eval.api.model.LM.generate_until`; through the model's own `generate`."""
        return self._remembered("generate_until", requests, super().generate_until)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps of the model in its results; nothing is asked of a hub."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_revision": self.revision or "",
            "model_sha": "",
            "peft": self.peft or "",
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """See `HFLM.tok_encode`; texts of the running call were encoded together beforehand."""
        if add_special_tokens is None and not options and string in self._encoded:
            return self._encoded[string]
        return list(super().tok_encode(string, add_special_tokens=add_special_tokens, **options))

    def _remembered(
        self, kind: str, requests: list[Instance], compute: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """Answers from the cache, and from `compute` for the rest, which several processes share among them."""
        answers: dict[str, Any] = {}
        missing: dict[str, Instance] = {}
        # What is sampled is asked for anew each time, even by the same words.
        keys = [request_key(kind, r.args) + (f" {i}" if sampled(r.args) else "") for i, r in enumerate(requests)]
        for key, request in zip(keys, requests, strict=True):
            if self.cache is not None and (found := self.cache.get(key)) is not None:
                answers[key] = found
            else:
                missing.setdefault(key, request)
        if answers:
            self._say(
                f"cache      {len(answers)} of {len(answers) + len(missing)} {kind} requests were answered before"
            )
        mine = self._share(missing)
        fresh = list(zip(mine, compute([missing[key] for key in mine]) if mine else [], strict=True))
        answers.update(gather_object(fresh) if self.processes.num_processes > 1 else fresh)
        return [answers[key] for key in keys]

    def _share(self, missing: Mapping[str, Instance]) -> list[str]:
        """This process's part of the requests. Texts that begin alike stay together, so that sharing survives."""
        keys = list(missing)
        if self.processes.num_processes == 1:
            return keys
        texts = ["".join(map(str, missing[key].args)).encode("utf-32-be", errors="replace") for key in keys]
        return [keys[i] for i in split_paths(texts, self.processes.num_processes)[self.processes.process_index]]

    def _loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self._encode_together(requests)
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def _encode_together(self, requests: list[Instance]) -> None:
        """Token ids of the texts that `loglikelihood` is about to ask for, by the tokenizer's own threads.

        Exactly as `HFLM.tok_encode` gives them one by one: texts that begin with the BOS token are left to it.
        """
        bos = self.tokenizer.decode(self.prefix_token_id)
        pairs = [request.args for request in requests if request.args[0]]
        texts = [text for context, continuation in pairs for text in (context.rstrip(), context + continuation)]
        texts = [text for text in dict.fromkeys(texts) if text and not text.startswith(bos)]
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        self._encoded = dict(zip(texts, self.tokenizer(texts, **special)["input_ids"], strict=True)) if texts else {}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        if not self.streams:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options))
        self._check_lengths(requests)
        asked = [self._request(context, continuation) for _, context, continuation in requests]

        def finished(index: int, answer: RequestScore) -> None:
            if (arguments := requests[index][0]) is not None:  # rolling windows have none: their sum is remembered
                self.cache_hook.add_partial("loglikelihood", arguments, (answer.logprob, answer.greedy))

        progress = Progress(self.console, "scoring    ", "tokens") if self.processes.is_main_process else None
        answers = score_requests(self.scorer, asked, self.budget, finished, progress)
        return [(answer.logprob, answer.greedy) for answer in answers]

    def _check_lengths(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> None:
        """Count what does not fit, and say so once instead of once a request."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ModelError(
                f"an answer of {longest} tokens is longer than the model's {self.max_length} positions, so it cannot "
                "be scored; take another model or leave the task out"
            )
        over = {r[0][0]: n for r in requests if (n := len(r[1]) + len(r[2]) - self.max_length - 1) > 0}
        if not over:
            return
        self.truncated += len(over)
        words = (
            f"{len(over)} of {len({r[0][0] for r in requests})} contexts are longer than the model's {self.max_length} "
            f"positions, by up to {max(over.values())} tokens: their beginnings (shots, instructions) are cut off"
        )
        if self.on_truncation == "refuse":
            raise ModelError(f"{words}. Give fewer shots (--num_fewshot), or --truncate to go on as lm-eval does")
        self._say(f"note: {words}")

    def _request(self, context: list[int], continuation: list[int]) -> ScoreRequest:
        """Cut on the left to what the model can take, as lm-eval does: its input is all but the last token."""
        return ScoreRequest(tuple(context[-(self.max_length + 1 - len(continuation)) :]), tuple(continuation))

    def _say(self, text: str) -> None:
        if self.processes.is_main_process:
            self.console.print(text, markup=False, highlight=False)


def lm_eval_command(argv: Sequence[str]) -> None:
    """lm-eval's own command line in a process where this module, and with it `--model preftree`, is known.

    lm-eval 0.4.13 looks for no models outside itself; its documented way is to import them and call it. Later
    releases find them by the entry point in pyproject.toml.
    """
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = [name for name, value in options.items() if name not in _PASSED_ON and value not in (None, False)]
    if unknown:
        raise SettingsError(
            *(
                f"--model_args {name}: not an argument of lm-eval's model preftree.{did_you_mean(name, _KNOWN)} "
                f"It takes {', '.join(sorted(_KNOWN))}; for anything else use --model hf."
                for name in unknown
            )
        )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without HFLM's warning that the model comes loaded: it does so on purpose."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
