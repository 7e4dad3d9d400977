"""The reference: the same model with the adapter switched off, its log-probs computed once for each answer.

Kept per token and in float32, under a hash of the token ids, so that an answer seen in an earlier epoch, in
evaluation, in another run or under another row is not computed again.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

import torch
from peft import PeftModel
from torch import Tensor

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.model.score import LeafLogprobs, evaluating, leaf_logprobs
from preftree.train.store import LogprobStore


class Reference:
    """Reference log-probs of forests, remembered by content.

    Args:
        model: PEFT model. Adapter-off is the reference only while nothing but the adapter is trained.
        store: where they are kept on disk; None keeps them in memory.

    Raises:
        ModelError: the base model's own weights are trained too.
    """

    def __init__(self, model: PeftModel, store: LogprobStore | None = None) -> None:
        foreign = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ".lora_" not in name and ".modules_to_save." not in name
        ]
        if foreign:
            raise ModelError(
                f"the reference is the model without its adapter, but {len(foreign)} other weights are "
                f"trained too (first: {foreign[0]}), so switching the adapter off is not the starting model"
            )
        self.model = model
        self.store = store
        self.hits = 0
        self.misses = 0
        self._known: dict[bytes, Tensor] = dict(store) if store is not None else {}

    @torch.no_grad()
    def token_logprobs(self, forest: Forest) -> Tensor:
        """log r of the forest's scored tokens, (S,), on its device. Not differentiable."""
        keys = [_key(ids, n) for ids, n in zip(forest.unrolled(), forest.leaf_lengths, strict=True)]
        missing = sum(key not in self._known for key in keys)
        self.hits += len(keys) - missing
        self.misses += missing
        if missing:
            for key, token_S in zip(keys, self._compute(forest).by_leaf().values(), strict=True):
                self._remember(key, token_S.cpu())
        return torch.cat([self._known[key] for key in keys]).to(forest.device)

    def flush(self) -> None:
        """Put what was computed on disk."""
        if self.store is not None:
            self.store.flush()

    def _remember(self, key: bytes, token_S: Tensor) -> None:
        if key not in self._known:
            self._known[key] = token_S
            if self.store is not None:
                self.store.add(key, token_S)

    def _compute(self, forest: Forest) -> LeafLogprobs:
        with evaluating(self.model), self.model.disable_adapter():
            return leaf_logprobs(self.model, forest)


def _key(sequence: Tensor, scored: int) -> bytes:
    """Which tokens were scored after which: the sequence and how many of its last tokens are the answer."""
    return blake2b(array("q", [scored, *sequence.tolist()]).tobytes(), digest_size=16).digest()
