"""Many requests as one stream: the trie of all of them, depth first, cut wherever the budget is full.

A request is a context and a continuation whose log-prob is wanted. Every common prefix occurs once: few-shot examples
under which there are many questions, a question with its options, options that share their first tokens. The last
token of a continuation predicts nothing, so it is not in the stream at all, and options of one token cost nothing
beyond their question.

The stream is cut into stretches of at most a budget of tokens. A cut may fall anywhere, even inside a prefix: the path
that leads to the next token is the known prefix of the next stretch, and its keys and values have been kept. So every
token of the trie is computed exactly once, whatever the budget, and the budget bounds memory.

Shape suffixes: N tokens of the stream, K known and T fresh tokens of a stretch, R rows to be scored, S scored tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.forest.forest import Forest, Segment


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What is asked: log p(continuation | context), both as token ids, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context:
            raise ValueError("a request needs at least one context token: it predicts the first one asked for")
        if not self.continuation:
            raise ValueError("an empty continuation has no log-prob")

    @property
    def computed(self) -> int:
        """Tokens to compute: the last one of the continuation predicts nothing."""
        return len(self.context) + len(self.continuation) - 1


@dataclass(frozen=True, eq=False)
class Stretch:
    """A piece of the stream, with the path that leads to it.

    Args:
        forest: the known path (its first `known` tokens), then the fresh tokens; without leaves of its own.
        known: tokens of the path; their keys and values were computed with earlier stretches.
        keep: indices into `forest` of the next stretch's known path.
        row_R: fresh tokens (counted from the first fresh one) whose hidden states are needed, ascending.
        slot_S, target_S, request_S: for each scored token its predictor (index into `row_R`), its id and the
            request that it belongs to.
    """

    forest: Forest
    known: int
    keep: Tensor
    row_R: Tensor
    slot_S: Tensor
    target_S: Tensor
    request_S: Tensor

    @property
    def fresh(self) -> Forest:
        """The fresh tokens alone, as a model's body takes them; positions still count the known path."""
        full, after = self.forest, slice(self.known, None)
        return _bare(full.input_ids_T[after], full.position_ids_T[after], full.subtree_end_T[after])


class Stream:
    """The trie of `requests` as three arrays, in the depth-first order of sorted token ids.

    The answers do not depend on the order of the requests, nor on where the stream is cut.
    """

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        paths = [_key(request) for request in requests]
        order = sorted(range(len(requests)), key=paths.__getitem__)
        shared = common_prefixes([paths[i] for i in order])
        total = sum(len(paths[i]) // 4 - h for i, h in zip(order, shared, strict=True))
        longest = max((len(path) // 4 for path in paths), default=0)
        self.id_N = torch.zeros(total, dtype=torch.int32)
        self.depth_N = torch.zeros(total, dtype=torch.int32)
        self.end_N = torch.full((total,), total, dtype=torch.int32)
        place = torch.zeros(longest, dtype=torch.long)  # of each token of the current path, by depth
        start, before, rows = 0, 0, []
        for index, h in zip(order, shared, strict=True):
            path, context = paths[index], len(requests[index].context)
            length = len(path) // 4
            stop = start + length - h
            self.id_N[start:stop] = torch.tensor(struct.unpack(f">{length - h}I", path[4 * h :]), dtype=torch.int32)
            self.depth_N[start:stop] = torch.arange(h, length)
            self.end_N[place[h:before]] = start  # what this path does not pass through ends here
            place[h:length] = torch.arange(start, stop)
            rows.append(place[context - 1 : length].clone())
            start, before = stop, length
        self._sort_scored(requests, order, rows)

    def _sort_scored(self, requests: Sequence[ScoreRequest], order: list[int], rows: list[Tensor]) -> None:
        """Scored tokens in the order of their predictors, so that a stretch's are neighbours."""
        empty = torch.zeros(0, dtype=torch.long)
        row_S = torch.cat([empty, *rows])
        target_S = torch.tensor([token for i in order for token in requests[i].continuation], dtype=torch.long)
        request_S = torch.tensor([i for i in order for _ in requests[i].continuation], dtype=torch.long)
        self.row_S, by_row = row_S.sort(stable=True)
        self.target_S, self.request_S = target_S[by_row], request_S[by_row]

    def __len__(self) -> int:
        return self.id_N.shape[0]

    def cut(self, budget: int, device: torch.device | str = "cpu") -> Iterator[Stretch]:
        """Stretches of about equal length, each of at most `budget` fresh tokens."""
        for start, stop in even_pieces(0, len(self), budget):
            yield self.stretch(start, stop, device)

    def stretch(self, start: int, stop: int, device: torch.device | str = "cpu") -> Stretch:
        """The tokens from `start` up to `stop`, with the path that leads to them."""
        known_K = (self.end_N[:start] > start).nonzero().squeeze(1)
        place_T = torch.cat([known_K, torch.arange(start, stop)])
        keep = (self.end_N[place_T] > stop).nonzero().squeeze(1)  # what leads to token `stop`
        return self._stretch(place_T, start, stop, keep, torch.device(device))

    def request_through(self, token: int) -> int:
        """A request whose path passes through a token."""
        return int(self.request_S[torch.searchsorted(self.row_S, token)])

    def _stretch(self, place_T: Tensor, start: int, stop: int, keep: Tensor, device: torch.device) -> Stretch:
        known = len(place_T) - (stop - start)
        end_T = self.end_N[place_T].long().clamp(max=stop) - start + known
        first, last = torch.searchsorted(self.row_S, torch.tensor([start, stop])).tolist()
        row_R, slot_S = torch.unique_consecutive(self.row_S[first:last], return_inverse=True)
        id_T, depth_T = self.id_N[place_T].long(), self.depth_N[place_T].long()
        segments = _segments(depth_T, end_T, known)
        return Stretch(
            forest=_bare(id_T.to(device), depth_T.to(device), end_T.to(device), segments),
            known=known,
            keep=keep.to(device),
            row_R=(row_R - start).to(device),
            slot_S=slot_S.to(device),
            target_S=self.target_S[first:last].to(device),
            request_S=self.request_S[first:last],
        )


def even_pieces(start: int, stop: int, budget: int) -> list[tuple[int, int]]:
    """A range in pieces of about equal length, each of at most `budget`."""
    if budget < 1:
        raise ValueError(f"the token budget must be at least 1, got {budget}")
    length, count = stop - start, -(-(stop - start) // budget)
    return [(start + length * n // count, start + length * (n + 1) // count) for n in range(count)]


def split_paths(paths: Sequence[bytes], parts: int) -> list[list[int]]:
    """Indices of `paths` for several processes: neighbours in the trie stay together, its tokens are split evenly.

    Args:
        paths: four bytes per token, big-endian.
    """
    order = sorted(range(len(paths)), key=paths.__getitem__)
    shared = common_prefixes([paths[i] for i in order])
    fresh = [len(paths[i]) // 4 - h for i, h in zip(order, shared, strict=True)]
    total, seen = max(1, sum(fresh)), 0
    found: list[list[int]] = [[] for _ in range(parts)]
    for index, tokens in zip(order, fresh, strict=True):
        found[min(parts - 1, seen * parts // total)].append(index)
        seen += tokens
    return found


def common_prefixes(sorted_paths: Sequence[bytes]) -> list[int]:
    """For each path the number of tokens that it has in common with the one before it."""
    shared = [0] * len(sorted_paths)
    for i in range(1, len(sorted_paths)):
        a, b = sorted_paths[i - 1], sorted_paths[i]
        size = min(len(a), len(b))
        # Big-endian numbers: the highest bit in which they differ says where the first difference is.
        different = int.from_bytes(a[:size]) ^ int.from_bytes(b[:size])
        shared[i] = (8 * size - different.bit_length()) // 32
    return shared


def _key(request: ScoreRequest) -> bytes:
    """The tokens that must be computed for a request, so that bytes sort as token ids do."""
    path = request.context + request.continuation[:-1]
    return struct.pack(f">{len(path)}I", *path)


def _bare(
    input_ids_T: Tensor, position_ids_T: Tensor, subtree_end_T: Tensor, segments: tuple[Segment, ...] = ()
) -> Forest:
    """A forest without leaves: tokens, positions, mask and segments."""
    none = torch.zeros(0, dtype=torch.long, device=input_ids_T.device)
    return Forest(input_ids_T, position_ids_T, subtree_end_T, segments, (), (), none, none, none, ())


def _segments(position_A: Tensor, end_A: Tensor, known: int) -> tuple[Segment, ...]:
    """The runs without a fork; one begins at the first fresh token in any case."""
    if len(position_A) == 0:
        return ()
    fork_A = torch.ones(len(position_A), dtype=torch.bool)
    fork_A[1:] = (position_A[1:] != position_A[:-1] + 1) | (end_A[1:] != end_A[:-1])
    if known < len(fork_A):
        fork_A[known] = True
    starts = fork_A.nonzero().squeeze(1).tolist()
    segments: list[Segment] = []
    path: list[int] = []  # indices of the segments above the next one
    for start, end in zip(starts, [*starts[1:], len(position_A)], strict=True):
        while path and int(end_A[segments[path[-1]].start]) <= start:
            path.pop()
        segments.append(Segment(start, end, path[-1] if path else -1, int(position_A[start]), None))
        path.append(len(segments) - 1)
    return tuple(segments)
