"""lm-eval's model class over token trees: `preftree` beside `hf`, the same numbers for less work.

It is lm-eval's own `HFLM` in all that touches text: chat templates, BOS, empty contexts, truncation of long requests
on the left, generation. Only the scoring of token ids differs: all requests at once, as one stream in which every
common prefix is computed once (`model.stream`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import PreTrainedModel

from preftree.errors import ModelError, SettingsError
from preftree.evaluate.cache import RequestCache, request_key, sampled
from preftree.evaluate.options import check_options
from preftree.evaluate.quiet import without_warnings
from preftree.forest import ScoreRequest
from preftree.forest.stream import split_paths
from preftree.hardware.device import kind_of, require_device
from preftree.hardware.precision import choose_dtype
from preftree.io.console import visible
from preftree.io.progress import Progress
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.model.lora import load_adapter
from preftree.model.memory import is_out_of_memory
from preftree.model.score import attach
from preftree.model.stream import PathTooLong, RequestScore, can_stream, score_requests

#: Tokens per forward pass, and per thread of a CPU: enough for full-speed products, few enough for little memory.
BUDGET = 16384
BUDGET_PER_THREAD = 256
#: Tokens per forest of held-out pairs on a CPU, where prompts that begin alike share what fits into one forest.
FOREST_BUDGET = 2048
#: Nats per token by which a cached answer may differ from a new one at least: contexts are longer than the check's.
LEAST_DISAGREEMENT = 1e-3


@register_model("preftree")
class PreftreeLM(HFLM):
    """`lm_eval.models.huggingface.HFLM` whose log-likelihoods come from token trees.

    Args:
        pretrained: a folder, a hub id, `smollm2`, or a loaded transformers model.
        peft: folder of a PEFT adapter on it.
        dtype: float32, bfloat16, float16, or auto: what is fast on the device (see `hardware.precision`).
        device: cpu, cuda, cuda:0, …; None takes a GPU if there is one.
        revision: of the model on the hub.
        tokens_per_forest: new tokens per forward pass.
        on_truncation: "warn" (what lm-eval does) or "refuse" requests that are longer than the model's positions.
        options: arguments of `HFLM` that concern text (see `options`).

    Raises:
        SettingsError: an argument of `HFLM` that has no effect here.
        DeviceError: `device` does not exist.
        ModelError: the model or adapter cannot be loaded, or they do not fit together.
    """

    batch_size_per_gpu: int | str
    """For what goes through lm-eval's own batches; "auto" finds a size that fits by itself."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        peft: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        revision: str | None = None,
        tokens_per_forest: int | None = None,
        on_truncation: str = "warn",
        **options: Any,
    ) -> None:
        check_options(options)
        self.console = Console(soft_wrap=True, stderr=True)
        self.processes = PartialState(cpu=kind_of(device or "") == "cpu" or not torch.cuda.is_available())
        if isinstance(pretrained, str):
            device = device or str(self.processes.device)
            require_device(device)
            source = resolve(pretrained)
            extra: dict[str, Any] = {"revision": revision} if revision else {}
            if options.get("tokenizer") is None:
                # As in `hf`: a tokenizer that adds no BOS by itself adds one only if it is loaded with this flag.
                bos = {name: value for name, value in options.items() if name == "add_bos_token" and value is not None}
                options["tokenizer"] = load_tokenizer(source, **extra, **bos)
            choice = choose_dtype(device, str(dtype).removeprefix("torch."))
            self.say(f"precision  {choice}")
            model: Any = load_model(source, choice.value, **extra).to(device)
        else:
            model = pretrained
        if peft:
            model = load_adapter(model, peft)
        model.requires_grad_(False)  # frozen weights may go through fused kernels
        try:
            with without_warnings("lm_eval.models.huggingface"):
                super().__init__(pretrained=model, dtype=None, **options)
        except ValueError as problem:  # two arguments that lm-eval itself does not take together
            raise SettingsError(f"--model_args: {problem}") from problem
        self.pretrained, self.peft, self.revision = str(pretrained), peft, revision
        cpu = self.device.type == "cpu"
        per_pass = max(2 * BUDGET_PER_THREAD, min(FOREST_BUDGET, BUDGET_PER_THREAD * torch.get_num_threads()))
        self.budget = int(tokens_per_forest or (per_pass if cpu else BUDGET))
        self.forest_budget = int(tokens_per_forest or (FOREST_BUDGET if cpu else BUDGET))
        self.cache: RequestCache | None = None
        self.on_truncation, self.truncated = on_truncation, 0
        self._encoded: dict[str, list[int]] = {}
        self._instances: dict[tuple[Any, ...], Instance] = {}
        self.scorer = attach(self.model)
        self.streams, reason = can_stream(self.scorer)
        way = f"token trees, {self.budget} tokens per forward pass" if self.streams else "lm-eval's own batches"
        self.say(f"scoring    {way}: {reason}")

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the model and the request's text."""
        names = ("add_bos_token", "prefix_token_id", "max_length", "truncation", "think_end_token", "enable_thinking")
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        path = self.scorer.name if self.streams else "lm-eval"
        return {name: getattr(self, name) for name in names} | {"path": path, "tokenizer": vocabulary}

    @property
    def max_length(self) -> int:
        """See `HFLM.max_length`; MPT's positions have a name of their own, and its code fails beyond them."""
        own = getattr(self.model.config, "max_seq_len", None)
        length = int(super().max_length)
        return min(length, own) if own and not self._max_length else length

    def remember(self, cache: RequestCache) -> None:
        """Take answers from `cache`, and put new ones there as they come."""
        self.cache, self._cache_checked = cache, False
        self.set_cache_hook(cache)  # type: ignore[arg-type]
        self.processes.wait_for_everyone()  # or a process could read what another one has written by now

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM.loglikelihood`."""
        return self._remembered("loglikelihood", requests, self._loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `lm_eval.api.model.LM.loglikelihood_rolling`."""
        rolling = super().loglikelihood_rolling

        def compute(missing: list[Instance]) -> list[float]:
            size = self.batch_size_per_gpu
            if self.streams:
                self.batch_size_per_gpu = sys.maxsize  # one stream of all windows
            try:
                return list(rolling(missing, disable_tqdm=True))
            finally:
                self.batch_size_per_gpu = size

        return self._remembered("loglikelihood_rolling", requests, compute)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `lm_eval.api.model.LM.generate_until`; through the model's own `generate`."""
        generate = super().generate_until
        return self._remembered(
            "generate_until", requests, lambda missing: self._in_smaller_batches(lambda: generate(missing))
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps of the model in its results; no hub is asked."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_revision": self.revision or "",
            "model_sha": "",
            "peft": self.peft or "",
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """See `HFLM.tok_encode`; the texts of a running call were encoded together beforehand."""
        if add_special_tokens is None and not options and string in self._encoded:
            return self._encoded[string]
        return list(super().tok_encode(string, add_special_tokens=add_special_tokens, **options))

    def _remembered(
        self, kind: str, requests: list[Instance], compute: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """Answers from the cache, and from `compute` for the rest, which is sharded over the processes."""
        # What is sampled is asked for anew each time, even by the same words.
        keys = [request_key(kind, r.args) + (f" {i}" if sampled(r.args) else "") for i, r in enumerate(requests)]
        wanted = dict(zip(keys, requests, strict=True))
        answers = self._cached(kind, wanted)
        missing = {key: request for key, request in wanted.items() if key not in answers}
        if answers:
            self.say(f"cache      {len(answers)} of {len(wanted)} {kind} requests were answered before")
        mine = self._shard(missing)
        fresh = list(zip(mine, compute([missing[key] for key in mine]) if mine else [], strict=True))
        answers.update(gather_object(fresh) if self.processes.num_processes > 1 else fresh)
        if self.cache is not None:  # all processes know the same answers, or they would shard the next call differently
            self.cache.learn({key: answers[key] for key, request in missing.items() if not sampled(request.args)})
        return [answers[key] for key in keys]

    def _cached(self, kind: str, wanted: Mapping[str, Instance]) -> dict[str, Any]:
        """What the cache holds of `wanted`. One answer is computed again first: a cache that disagrees is dropped."""
        if self.cache is None:
            return {}
        found = {key: answer for key in wanted if (answer := self.cache.get(key)) is not None}
        if found and kind == "loglikelihood" and not self._cache_checked:
            self._cache_checked = True
            key = min(found, key=lambda key: len("".join(map(str, wanted[key].args))))
            ((logprob, _),) = self._loglikelihood([wanted[key]])
            agrees = [abs(logprob - found[key][0]) <= self._tolerance(wanted[key])]
            if self.processes.num_processes > 1:
                broadcast_object_list(agrees)
            if not agrees[0]:
                self.say(
                    f"cache      discarded: it holds {found[key][0]:.4f} where {logprob:.4f} is right "
                    f"({self._named(wanted[key].args)})"
                )
                self.cache.forget()
                return {}
        return found

    def _tolerance(self, request: Instance) -> float:
        """How far two computations of one answer may be apart."""
        tokens = len(self.tokenizer(request.args[1], add_special_tokens=False)["input_ids"])
        return max(self.scorer.check.tolerance, LEAST_DISAGREEMENT) * max(1, tokens)

    def _shard(self, missing: Mapping[str, Instance]) -> list[str]:
        """This process's shard of the requests. Texts with a common prefix stay together: it is computed once."""
        keys = list(missing)
        if self.processes.num_processes == 1:
            return keys
        texts = ["".join(map(str, missing[key].args)).encode("utf-32-be", errors="replace") for key in keys]
        return [keys[i] for i in split_paths(texts, self.processes.num_processes)[self.processes.process_index]]

    def _loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise SettingsError(
                "--model_args enable_thinking=True is for tasks that generate; log-likelihoods leave no room to think "
                f"({', '.join(sorted({str(request.task_name) for request in requests}))})"
            )
        self._encode_together(requests)
        self._instances = {request.args: request for request in requests}
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded, self._instances = {}, {}

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
        self._check_continuations(requests)
        if not self.streams:
            score = super()._loglikelihood_tokens
            one_batch = options.get("override_bs") is not None  # a batch of windows; their bar would be one of many
            return self._in_smaller_batches(lambda: list(score(requests, disable_tqdm=one_batch, **options)))
        self._check_lengths(requests)
        asked = [self._request(context, continuation) for _, context, continuation in requests]

        def finished(index: int, answer: RequestScore) -> None:
            if (arguments := requests[index][0]) is not None:  # rolling windows have none: their sum is remembered
                self.cache_hook.add_partial("loglikelihood", arguments, (answer.logprob, answer.greedy))

        def shrunk(budget: int) -> None:
            self.budget = budget
            self.say(f"note: out of memory; {budget} tokens per forward pass from here on")

        progress = Progress(self.console, "scoring    ", "tokens") if self.processes.is_main_process else None
        try:
            answers = score_requests(self.scorer, asked, self.budget, finished, progress, shrunk)
        except PathTooLong as error:
            raise ModelError(
                f"out of memory: {self._named(requests[error.request][0])} does not fit, even one token at a time "
                f"({error.tokens} tokens). Give fewer shots (--num_fewshot) or a lower --max_length with --truncate, "
                "or take a device with more memory"
            ) from error
        return [(answer.logprob, answer.greedy) for answer in answers]

    def _in_smaller_batches(self, compute: Callable[[], list[Any]]) -> list[Any]:
        """Redo what runs out of memory with half the batch size, until one request alone does not fit."""
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                size = self.batch_size_per_gpu
                if not is_out_of_memory(error) or not isinstance(size, int):
                    raise
                if size == 1:
                    raise ModelError(
                        "out of memory with one request per batch. Give fewer shots (--num_fewshot) or a lower "
                        "--max_length with --truncate, or take a device with more memory"
                    ) from error
            self.batch_size_per_gpu = size // 2
            self.say(f"note: out of memory; {self.batch_size_per_gpu} requests per batch from here on")
            clear_device_cache(garbage_collection=True)

    def _check_continuations(self, requests: Iterable[tuple[Any, list[int], list[int]]]) -> None:
        """Refuse answers that are no tokens of their own, which lm-eval's own code fails on."""
        empty = [arguments for arguments, _, continuation in requests if not continuation]
        if empty:
            raise ModelError(
                f"{self._named(empty[0])} cannot be scored: with this tokenizer {_short(empty[0][1])} after its "
                f"context adds no token of its own ({len(empty)} such answers in all). "
                "Leave the task out, or take a model with another tokenizer"
            )

    def _check_lengths(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> None:
        """Count what does not fit, and say so once instead of once per request."""
        longest = max(requests, key=lambda request: len(request[2]), default=None)
        if longest is not None and len(longest[2]) > self.max_length:
            raise ModelError(
                f"an answer of {len(longest[2])} tokens is longer than the model's {self.max_length} positions, so it "
                f"cannot be scored ({self._named(longest[0])}); take another model or leave the task out"
            )
        over = {r[0][0]: n for r in requests if (n := len(r[1]) + len(r[2]) - self.max_length - 1) > 0}
        if not over:
            return
        self.truncated += len(over)
        words = (
            f"{len(over)} of {len({r[0][0] for r in requests})} contexts are longer than the model's {self.max_length} "
            f"positions, by up to {max(over.values())} tokens: their start (shots, instructions) is cut off"
        )
        if self.on_truncation == "refuse":
            raise ModelError(f"{words}. Give fewer shots (--num_fewshot), or --truncate to continue as lm-eval does")
        self.say(f"note: {words}")

    def _request(self, context: list[int], continuation: list[int]) -> ScoreRequest:
        """Cut on the left to what the model can take, as lm-eval does: its input is all but the last token."""
        return ScoreRequest(tuple(context[-(self.max_length + 1 - len(continuation)) :]), tuple(continuation))

    def _named(self, arguments: Any) -> str:
        """A request as a user can find it: its task, question and option, or its text."""
        instance = self._instances.get(arguments) if arguments is not None else None
        if instance is None:
            return "a window of a text" if arguments is None else f"the request {_short(arguments[-1])}"
        option = _short(instance.args[1])
        return f"task {instance.task_name}, question {instance.doc_id}, option {instance.idx} {option}"

    def say(self, text: str) -> None:
        """Print a line on standard error, from the first process only."""
        if self.processes.is_main_process:
            self.console.print(visible(text), markup=False, highlight=False)


def lm_eval_command(argv: Sequence[str]) -> None:
    """lm-eval's own command line in a process where this module, and with it `--model preftree`, is known.

    lm-eval 0.4.13 looks for no models outside itself; its documented way is to import them and call it. Later
    releases find them by the entry point in pyproject.toml.
    """
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()


def _short(text: str, room: int = 60) -> str:
    return repr(text if len(text) <= room else f"{text[: room - 1]}…")
