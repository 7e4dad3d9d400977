"""Scoring of requests: log p(continuation | context) and whether greedy decoding would give it, no gradients.

The forward pass of a stretch keeps, layer by layer, the keys and values of the path that the next stretch
starts with. The families' bodies run as they are: the memory sits in the attention function handed to them.

Shape suffixes: as in `forest.stream`; D head size or hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

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


class KVCache:
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
    check, probe = scorer.check, scorer.check.probe
    requests = [
        ScoreRequest(tuple(ids[:-n].tolist()), tuple(ids[-n:].tolist()))
        for ids, n in zip(probe.unrolled(), probe.leaf_lengths, strict=True)
    ]
    expected = [float(part.sum()) for part in check.expected_S.split(probe.leaf_lengths)]
    found = score_requests(scorer, requests, budget=7)
    error = max(abs(a.logprob - e) / n for a, e, n in zip(found, expected, probe.leaf_lengths, strict=True))
    reason = f"log-probs off by {error:.1g} per token on a test stream (allowed {check.tolerance:.1g})"
    return error <= check.tolerance, reason


def score_requests(
    scorer: Scorer,
    requests: Sequence[ScoreRequest],
    budget: int,
    finished: Callable[[int, RequestScore], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    shrunk: Callable[[int], None] | None = None,
) -> list[RequestScore]:
    """Score `requests`, each token of their trie computed once; answers in the order of the requests.

    Requests that are longer than what can be computed together (`Limits.path`) are computed one at a time and whole.

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
    path = scorer.path
    if not isinstance(path, TreePath):
        raise ModelError(f"a stream of requests needs token trees, and this model is scored by {scorer.name}")
    longest = path.limits.path
    alone = [i for i, request in enumerate(requests) if longest is not None and request.computed > longest]
    together = sorted(set(range(len(requests))) - set(alone))
    scores: dict[int, RequestScore] = {}

    def keep(index: int, score: RequestScore) -> None:
        scores[index] = score
        if finished is not None:
            finished(index, score)

    groups = [group for group in (together, *([i] for i in alone)) if group]
    parts = [_Pass(scorer, path, requests, group, keep) for group in groups]
    total, done = sum(len(part.stream) for part in parts), 0
    with evaluating(scorer.model):
        for part in parts:
            path.limits.reset()
            for tokens in part.run(budget, shrunk) if part.names is together else part.run_whole():
                done += tokens
                if progress is not None:
                    progress(done, total)
        path.limits.reset()
    return [scores[index] for index in range(len(requests))]


class _Pass:
    """The forward passes over the stream of those requests that are called `names`, and the sums that they add up."""

    def __init__(
        self,
        scorer: Scorer,
        path: TreePath,
        requests: Sequence[ScoreRequest],
        names: Sequence[int],
        finished: Callable[[int, RequestScore], None],
    ) -> None:
        self.scorer, self.path, self.names, self.finished = scorer, path, names, finished
        mine = [requests[name] for name in names]
        self.stream, self.memory = Stream(mine), KVCache(path.backend.attend_fresh)
        self.logprob_N = torch.zeros(len(mine), dtype=torch.float64)
        self.greedy_N = torch.ones(len(mine), dtype=torch.bool)
        self.left_N = torch.tensor([len(request.continuation) for request in mine])

    def run(self, budget: int, shrunk: Callable[[int], None] | None) -> Iterator[int]:
        """Score the stream in passes of at most `budget` tokens; yields the tokens of each."""
        pieces = even_pieces(0, len(self.stream), budget)
        while pieces:
            start, stop = pieces[0]
            if self._fits(start, stop):
                pieces.pop(0)
                yield stop - start
                continue
            if stop - start == 1:
                self._too_long(start)
            self.memory.rewind()
            clear_device_cache(garbage_collection=True)
            smaller = (stop - start) // 2
            pieces = even_pieces(start, len(self.stream), smaller)
            if shrunk is not None:
                shrunk(smaller)

    def run_whole(self) -> Iterator[int]:
        """Score the stream, a single sequence, in one pass; yields its tokens."""
        if not self._fits(0, len(self.stream)):
            self._too_long(len(self.stream) - 1)
        yield len(self.stream)

    def _fits(self, start: int, stop: int) -> bool:
        """Score the tokens from `start` up to `stop`, unless memory runs out."""
        try:
            self.score(start, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False  # after the handler: the error holds on to the failed pass's tensors
        return True

    def _too_long(self, token: int) -> NoReturn:
        tokens = self.stream.stretch(token, token + 1).known + 1
        raise PathTooLong(self.names[self.stream.request_through(token)], tokens)

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
        for index in where_S[self.left_N[where_S] == 0].unique().tolist():
            self.finished(self.names[index], RequestScore(float(self.logprob_N[index]), bool(self.greedy_N[index])))
