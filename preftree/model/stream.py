"""Scoring of requests: log p(continuation | context) and whether greedy decoding would give it, no gradients.

The forward pass of a stretch keeps, layer by layer, the keys and values of the path that the next stretch
starts with. The families' bodies run as they are: the memory sits in the attention function handed to them.

Shape suffixes: as in `forest.stream`; D head size or hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.forest.stream import ScoreRequest, Stream, Stretch
from preftree.model.attention import Attend, AttendFresh, Rules
from preftree.model.logprob import Head, token_scores
from preftree.model.paths import TreePath
from preftree.model.score import Scorer, evaluating


@dataclass(frozen=True, slots=True)
class RequestScore:
    """log p of a continuation (summed over its tokens, in nats), and is each of its tokens the most probable one?"""

    logprob: float
    greedy: bool


class Memory:
    """Keys and values of the known path, by layer, in the order in which a forward pass calls its layers."""

    def __init__(self, attend_fresh: AttendFresh) -> None:
        self._attend_fresh = attend_fresh
        self._kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, stretch: Stretch) -> Attend:
        """Attention for one forward pass over `stretch.fresh`."""
        before, self._kept = self._kept, []

        def attend(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, fresh: Forest, rules: Rules) -> Tensor:
            if stretch.known:
                key_KKD, value_KKD = before[len(self._kept)]
                key_KTD = torch.cat([key_KKD, key_KTD], dim=1)
                value_KTD = torch.cat([value_KKD, value_KTD], dim=1)
            self._kept.append((key_KTD[:, stretch.keep], value_KTD[:, stretch.keep]))
            return self._attend_fresh(query_HTD, key_KTD, value_KTD, stretch, rules)

        return attend


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
    reason = f"log-probs off by {error:.1g} a token on a test stream (allowed {truth.tolerance:.1g})"
    return error <= truth.tolerance, reason


def score_requests(
    scorer: Scorer,
    requests: Sequence[ScoreRequest],
    budget: int,
    finished: Callable[[int, RequestScore], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RequestScore]:
    """Score `requests`, each token of their trie computed once; answers in the order of the requests.

    Args:
        scorer: one whose `can_stream` is true.
        budget: fresh tokens of a forward pass: memory grows with it, and overhead shrinks.
        finished: called with (index, answer) as soon as a request is done.
        progress: called with (tokens done, tokens in all) after each forward pass.

    Raises:
        ModelError: the scorer does not share prompts.
    """
    causal, path = scorer.causal, scorer.path
    if not isinstance(path, TreePath):
        raise ModelError(f"a stream of requests needs token trees, and this model is scored by {scorer.name}")
    stream, memory = Stream(requests), Memory(path.backend.attend_fresh)
    logprob_N = torch.zeros(len(requests), dtype=torch.float64)
    greedy_N = torch.ones(len(requests), dtype=torch.bool)
    left_N = torch.tensor([len(request.continuation) for request in requests])
    done = 0
    with evaluating(scorer.model):
        for stretch in stream.cut(budget, causal.device):
            hidden_RD = path.body(stretch.fresh, memory.attend(stretch))[stretch.row_R]
            logprob_S, greedy_S = token_scores(hidden_RD, stretch.slot_S, stretch.target_S, Head.of(causal))
            where_S = stretch.request_S
            logprob_N.index_add_(0, where_S, logprob_S.double().cpu())
            greedy_N[where_S[~greedy_S.cpu()]] = False
            left_N.index_add_(0, where_S, torch.full_like(where_S, -1))
            if finished is not None:
                for index in where_S[left_N[where_S] == 0].unique().tolist():
                    finished(index, RequestScore(float(logprob_N[index]), bool(greedy_N[index])))
            done += len(stretch.forest) - stretch.known
            if progress is not None:
                progress(done, len(stream))
    return [RequestScore(*pair) for pair in zip(logprob_N.tolist(), greedy_N.tolist(), strict=True)]
