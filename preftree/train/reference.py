"""Reference log-probs, computed once for each answer by whatever model the reference is (see `reference_models`).

Kept per token and in float32, under a hash of the token ids, so that an answer seen in an earlier epoch, in
evaluation, in another run or under another row is not computed again. Each rank computes what is missing in its
own share of a step, tells the others, and writes its own part to disk: no answer is computed by two ranks.

What is on disk is not trusted unseen: the first answer found there is computed again and compared, and a cache that
disagrees is discarded as a whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b

import torch
from torch import Tensor

from preftree.distributed.ranks import Ranks
from preftree.errors import RunError
from preftree.forest import Bundle, Forest, idle_forest, upload
from preftree.model.memory import is_out_of_memory
from preftree.model.score import LeafLogprobs
from preftree.train.reference_models import ReferenceModel
from preftree.train.store import LogprobStore, from_bytes, to_bytes


class Reference:
    """Reference log-probs of forests, remembered by content.

    Args:
        model: what computes them.
        store: where they are kept on disk; None keeps them in memory.
        ranks: the processes that share the work.
        autocast: context of every pass, the policy's own.
    """

    def __init__(
        self,
        model: ReferenceModel,
        store: LogprobStore | None = None,
        ranks: Ranks | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.autocast = model, autocast
        self.store = store
        self.ranks = ranks or Ranks()
        self.hits = 0
        self.misses = 0
        self._known: dict[bytes, Tensor] = dict(store) if store is not None else {}
        self._unverified, self._verified = frozenset(self._known), False

    def fill(self, forests: Sequence[Forest]) -> list[Forest]:
        """Compute what is missing of this rank's forests of a step and learn what the other ranks computed.

        All ranks call it together, each with its own forests. Returns those that had to be computed.
        """
        self._verify(forests)
        new: dict[bytes, Tensor] = {}
        missing: list[tuple[list[bytes], Forest]] = []
        for forest in forests:
            keys = _keys(forest)
            unknown = [key for key in keys if key not in self._known]
            self.misses += len(unknown)
            self.hits += len(keys) - len(unknown)
            if unknown:
                missing.append((keys, forest))
        counts = [count for (count,) in self.ranks.gather([len(missing)])]
        computed = [piece for _, forest in missing for piece in self._pieces(forest)]
        for keys, scores in computed:  # read when all of them are under way: the host waits for the device once
            token_S = scores.token_S.cpu()[: sum(scores.lengths)]
            new |= dict(zip(keys, token_S.split(scores.lengths), strict=True))
        if self.ranks.lockstep:
            for _ in range(max(counts) - len(missing)):  # dummy passes keep the ranks' collectives in step
                self._compute(idle_forest(self.model.device))
        for key, token_S in new.items():
            self._remember(key, token_S)
        if self.ranks.count > 1 and any(counts):
            for content in self.ranks.gather_bytes(to_bytes(new)):
                self._known |= from_bytes(content)
        return [forest for _, forest in missing]

    def token_logprobs(self, forest: Forest) -> Tensor:
        """log r of the forest's scored tokens, (S,), on its device. Not differentiable."""
        self.fill([forest])
        return self.known(forest)

    def known(self, forest: Forest) -> Tensor:
        """The same for a forest that went through `fill`."""
        padding = torch.zeros(len(forest.target_S) - sum(forest.leaf_lengths))
        return upload(torch.cat([*(self._known[key] for key in _keys(forest)), padding]), forest.device)

    def forget(self) -> None:
        """The reference has changed: what it computed is no longer true."""
        self._known.clear()

    def answers(self) -> Mapping[bytes, Tensor]:
        """Everything that is known, by key."""
        return self._known

    def learn(self, answers: Mapping[bytes, Tensor]) -> None:
        """Know what was computed before, in an earlier process of this run."""
        self._known |= answers

    def flush(self) -> None:
        """Put what was computed on disk."""
        if self.store is not None:
            self.store.flush()

    def _verify(self, forests: Sequence[Forest]) -> None:
        """Compute the longest answer again that `forests` share with the disk. All ranks come to the same verdict."""
        if self.store is None or self._verified:
            return
        found = [
            (len(ids), leaf, forest)
            for forest in forests
            for leaf, (key, ids) in enumerate(zip(_keys(forest), forest.unrolled_ids(), strict=True))
            if key in self._unverified
        ]
        if not any(count for (count,) in self.ranks.gather([len(found)])):
            return
        self._verified = True
        if found:
            _, leaf, forest = max(found, key=lambda each: each[0])
            wrong = self._disagrees(forest, leaf)
        else:
            wrong = False
            for _ in range(2 if self.ranks.lockstep else 0):
                self._compute(idle_forest(self.model.device))
        if any(verdict for (verdict,) in self.ranks.gather([int(wrong)])):
            self.store.discard()
            self._known = {key: token_S for key, token_S in self._known.items() if key not in self._unverified}

    def _disagrees(self, forest: Forest, leaf: int) -> bool:
        """Is the known answer `leaf` of `forest` further from a new computation than two new ones are apart?"""
        ids, length = forest.unrolled_ids()[leaf], forest.leaf_lengths[leaf]
        alone = Forest.of([Bundle(tuple(ids[:-length]), (tuple(ids[-length:]),), (0,))], device=forest.device)
        start = sum(forest.leaf_lengths[:leaf])
        first_S = self._compute(forest).token_S[start : start + length].cpu()
        second_S = self._compute(alone).token_S[:length].cpu()
        rounding = max(3 * _apart(first_S, second_S), _ROUNDING.get(self.model.dtype, 1e-3))
        known_S = self._known[_keys(forest)[leaf]]
        return known_S.shape != first_S.shape or not _apart(known_S, first_S) <= rounding

    def _remember(self, key: bytes, token_S: Tensor) -> None:
        if key not in self._known:
            self._known[key] = token_S
            if self.store is not None:
                self.store.add(key, token_S)

    def _compute(self, forest: Forest) -> LeafLogprobs:
        with self.autocast():
            return self.model(forest)

    def _pieces(self, forest: Forest) -> list[tuple[list[bytes], LeafLogprobs]]:
        """A forest's answers, in smaller forests where memory runs out."""
        try:
            return [(_keys(forest), self._compute(forest))]
        except Exception as problem:
            if not is_out_of_memory(problem) or self.ranks.lockstep or forest.shape is not None:
                raise
            if len(forest.leaf_lengths) == 1:
                raise RunError(
                    f"Out of memory in the reference pass with a single answer of {len(forest)} tokens with its "
                    "prompt. Lower --max_length and --max_prompt_length."
                ) from problem
        return [piece for half in forest.halves() for piece in self._pieces(half)]


#: Mean difference per token, in nats, that two ways of computing an answer may have. Where more is wrong than rounding
#: (a mask, a position, a weight), tenths of a nat are usual.
_ROUNDING = {torch.bfloat16: 0.03, torch.float16: 0.03}


def _apart(first_S: Tensor, second_S: Tensor) -> float:
    return float((first_S.double() - second_S.double()).abs().mean())


def _keys(forest: Forest) -> list[bytes]:
    """The key of each leaf, in layout order; all tokens are hashed once per forest."""

    def hashed() -> list[bytes]:
        return [_key(ids, n) for ids, n in zip(forest.unrolled_ids(), forest.leaf_lengths, strict=True)]

    return forest.cached("reference", hashed)


def _key(sequence: list[int], scored: int) -> bytes:
    """Which tokens were scored after which: the sequence and how many of its last tokens are the answer."""
    return blake2b(array("q", [scored, *sequence]).tobytes(), digest_size=16).digest()
