"""Scoring of requests: log p(continuation | context) and whether greedy decoding would give it, no gradients.

The forward pass of a stretch keeps, layer by layer, the keys and values of the path that the next stretch
starts with. The families' bodies run as they are: the memory sits in the attention function handed to them.

Shape suffixes: as in `forest.stream`; D head size or hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.forest.stream import ScoreRequest, Stream, Stretch, even_pieces
from preftree.model.attention import Attend, AttendFresh, Rules
from preftree.model.logprob import Head, token_scores
from preftree.model.memory import is_out_of_memory
from preftree.model.paths import TreePath
from preftree.model.score import Scorer, evaluating


@dataclass(frozen=True, slots=True)
class RequestScore:
    """log p of a continuation (summed over its tokens, in nats), and is each of its tokens the most probable one?"""

    logprob: float
    greedy: bool


class PathTooLong(ModelError):
    """The memory does not suffice for one more token behind its path; `request` is one that passes through it."""

    def __init__(self, request: int, tokens: int) -> None:
        super().__init__(f"out of memory: one token behind a path of {tokens - 1} tokens does not fit")
        self.request, self.tokens = request, tokens


class Memory:
    """Keys and values of the known path, by layer, in the order in which a forward pass calls its layers."""

    def __init__(self, attend_fresh: AttendFresh) -> None:
        self._attend_fresh = attend_fresh
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._next: list[tuple[Tensor, Tensor]] = []

    def attend(self, stretch: Stretch) -> Attend:
        """Attention for one forward pass over `stretch.fresh`."""
        after: list[tuple[Tensor, Tensor]] = []
        self._next = after

        def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, fresh: Forest, rules: Rules) -> Tensor:
            if stretch.known:
                key_KKD, value_KKD = self._kept[len(after)]
                key_KTD = torch.cat([key_KKD, key_KTD], dim=1)
                value_KTD = torch.cat([value_KKD, value_KTD], dim=1)
            after.append((key_KTD[:, stretch.keep], value_KTD[:, stretch.keep]))
            return self._attend_fresh(query_HTD, key_KTD, value_KTD, stretch, rules)

        return attend

    def advance(self) -> None:
        """The forward pass has succeeded: the next one begins where it ended."""
        self._kept, self._next = self._next, []

    def rewind(self) -> None:
        """The forward pass has failed: drop what it kept; the stretch can be cut shorter and computed again."""
        self._next = []


def can_stream(scorer: Scorer) -> tuple[bool, str]:
    """Is a stream, cut at awkward places, scored as the model's own forward scores single sequences? And why?"""
    if not scorer.shares_prompts:
        return False, scorer.reason
    truth, probe = scorer.truth, scorer.truth.probe
    requests = [
        ScoreRequest(tuple(ids[:-n].tolist()), tuple(ids[-n:].tolist()))
        for ids, n in zip(probe.unrolled(), probe.leaf_lengths, strict=True)
    ]
    expected = [float(part.sum()) for part in truth.expected_S.split(probe.leaf_lengths)]
    found = score_requests(scorer, requests, budget=7)
    error = max(abs(a.logprob - e) / n for a, e, n in zip(found, expected, probe.leaf_lengths, strict=True))
    reason = f"log-probs off by {error:.1g} per token on a test stream (allowed {truth.tolerance:.1g})"
    return error <= truth.tolerance, reason


def score_requests(
    scorer: Scorer,
    requests: Sequence[ScoreRequest],
    budget: int,
    finished: Callable[[int, RequestScore], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    shrunk: Callable[[int], None] | None = None,
) -> list[RequestScore]:
    """Score `requests`, each token of their trie computed once; answers in the order of the requests.

    Args:
        scorer: one whose `can_stream` is true.
        budget: fresh tokens per forward pass: memory grows with it, and overhead shrinks. A pass that runs out of
            memory is done again with half of it, as are those after it.
        finished: called with (index, answer) as soon as a request is done.
        progress: called with (tokens done, tokens in all) after each forward pass.
        shrunk: called with the new budget after the memory did not suffice.

    Raises:
        ModelError: the scorer does not share prompts.
        PathTooLong: not even one token fits into memory.
    """
    if not isinstance(scorer.path, TreePath):
        raise ModelError(f"a stream of requests needs token trees, and this model is scored by {scorer.name}")
    pass_ = _Pass(scorer, scorer.path, requests, finished)
    stream, pieces = pass_.stream, even_pieces(0, len(pass_.stream), budget)
    with evaluating(scorer.model):
        while pieces:
            start, stop = pieces[0]
            try:
                pass_.score(start, stop)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if stop - start == 1:
                    tokens = stream.stretch(start, stop).known + 1
                    raise PathTooLong(stream.request_through(start), tokens) from error
                smaller = (stop - start) // 2
            else:
                pieces.pop(0)
                if progress is not None:
                    progress(stop, len(stream))
                continue
            pass_.memory.rewind()  # outside the handler: the error holds on to the failed pass's tensors
            clear_device_cache(garbage_collection=True)
            pieces = even_pieces(start, len(stream), smaller)
            if shrunk is not None:
                shrunk(smaller)
    return pass_.answers()


class _Pass:
    """The forward passes over a stream, and the sums that they add up."""

    def __init__(
        self,
        scorer: Scorer,
        path: TreePath,
        requests: Sequence[ScoreRequest],
        finished: Callable[[int, RequestScore], None] | None,
    ) -> None:
        self.scorer, self.path, self.finished = scorer, path, finished
        self.stream, self.memory = Stream(requests), Memory(path.backend.attend_fresh)
        self.logprob_N = torch.zeros(len(requests), dtype=torch.float64)
        self.greedy_N = torch.ones(len(requests), dtype=torch.bool)
        self.left_N = torch.tensor([len(request.continuation) for request in requests])

    def score(self, start: int, stop: int) -> None:
        """Add the stream's tokens from `start` up to `stop`; nothing is added where this fails."""
        causal = self.scorer.causal
        stretch = self.stream.stretch(start, stop, causal.device)
        hidden_RD = self.path.body(stretch.fresh, self.memory.attend(stretch))[stretch.row_R]
        logprob_S, greedy_S = token_scores(hidden_RD, stretch.slot_S, stretch.target_S, Head.of(causal))
        where_S, added_S, greedy_S = stretch.request_S, logprob_S.double().cpu(), greedy_S.cpu()
        self.memory.advance()
        self.logprob_N.index_add_(0, where_S, added_S)
        self.greedy_N[where_S[~greedy_S]] = False
        self.left_N.index_add_(0, where_S, torch.full_like(where_S, -1))
        if self.finished is not None:
            for index in where_S[self.left_N[where_S] == 0].unique().tolist():
                self.finished(index, self.answer(index))

    def answer(self, index: int) -> RequestScore:
        """What is known of a request."""
        return RequestScore(float(self.logprob_N[index]), bool(self.greedy_N[index]))

    def answers(self) -> list[RequestScore]:
        """All requests in their order."""
        return [self.answer(index) for index in range(len(self.left_N))]
