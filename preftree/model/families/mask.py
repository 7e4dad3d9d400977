"""What travels through a model in place of its attention mask: the forest, and how far a layer's tokens see.

transformers builds the masks of nearly all its models in one place and hands each layer the one of its kind: causal,
with a sliding window, or in chunks. While a forest is scored that place makes a `ForestMask` instead, of the same kind.
So a window that only the mask knows is kept, families whose layers drop keyword arguments still get the forest,
and activation checkpointing replays a layer with it. A model that computes with its mask is refused: what it would do
to it, no backend knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor

from preftree.errors import ModelError
from preftree.forest import Forest
from preftree.model.attention import Attend, Rules

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]
NO_DROPOUT = "attention dropout is not possible over trees; switch it off or use --attention padded"
#: What a layer may do to its mask without changing what it says: look at it, take a part of it, move it.
_HARMLESS = {
    "__get__", "dim", "size", "stride", "numel", "__len__", "is_floating_point", "__getitem__", "expand", "contiguous",
    "to", "bool", "clone", "detach", "unsqueeze", "squeeze", "view", "reshape",
}  # fmt: skip
#: Those of them that return a number or a property.
_QUESTIONS = {"__get__", "dim", "size", "stride", "numel", "__len__", "is_floating_point"}


class ForestMask(Tensor):
    """A mask of one element that stands for `forest`, seen through a window or in chunks: `reach`, as in `Rules`."""

    forest: Forest
    attend: Attend
    reach: tuple[int | None, int | None]

    @classmethod
    def of(cls, forest: Forest, attend: Attend, reach: tuple[int | None, int | None]) -> Self:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool).as_subclass(cls)
        mask.forest, mask.attend, mask.reach = forest, attend, reach
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in _QUESTIONS or name == "as_subclass":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in _HARMLESS and isinstance(args[0], cls):
            return args[0]
        if name == "scaled_dot_product_attention":
            return _attention_of_torch(*args, **(kwargs or {}))
        raise ModelError(
            f"its layers compute with the attention mask ({name}), so that trees do not know what they see"
        )


def _attention_of_torch(query: Tensor, key: Tensor, value: Tensor, attn_mask: ForestMask, **options: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of (1, H, T, D), of a model that calls it by itself."""
    if options.get("dropout_p"):
        raise ModelError(NO_DROPOUT)
    window, chunk = attn_mask.reach
    scale = options.get("scale")
    rules = Rules(query.shape[-1] ** -0.5 if scale is None else scale, window=window, chunk=chunk)
    return attn_mask.attend(query[0], key[0], value[0], attn_mask.forest, rules).transpose(0, 1)[None]


class ForestPass:
    """One forward pass over a forest: makes the masks that the model asks for.

    Args:
        kinds: window and chunk of the masks of earlier passes, in the order in which the model asks for them, which is
            the same in every pass; the first pass finds them.
    """

    def __init__(self, forest: Forest, attend: Attend, kinds: list[tuple[int | None, int | None]]) -> None:
        self.forest, self.attended, self._attend, self._kinds = forest, 0, attend, kinds
        self._masks: dict[tuple[int | None, int | None], ForestMask] = {}
        self._made = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
        """One layer's attention; counted."""
        self.attended += 1
        return self._attend(query, key, value, forest, rules)

    def mask(self, mask_function: MaskFunction, sizes: list[int], device: torch.device) -> ForestMask:
        """The mask in place of `mask_function`, whose window or chunk is one of `sizes`."""
        if self._made == len(self._kinds):
            self._kinds.append(kind_of_mask(mask_function, sizes, device))
        kind = self._kinds[self._made]
        self._made += 1
        return self.mask_of(kind)

    def mask_of(self, kind: tuple[int | None, int | None]) -> ForestMask:
        """The mask of layers with this window and chunk."""
        if kind not in self._masks:
            self._masks[kind] = ForestMask.of(self.forest, self.attend, kind)
        return self._masks[kind]


_running: ContextVar[ForestPass | None] = ContextVar("forest pass", default=None)


def running() -> ForestPass | None:
    """The pass that is under way; None in a plain forward, and while a layer is replayed for its backward pass."""
    return _running.get()


@contextmanager
def run(forest_pass: ForestPass) -> Iterator[ForestPass]:
    """Have masks made by `forest_pass`."""
    token = _running.set(forest_pass)
    try:
        yield forest_pass
    finally:
        _running.reset(token)


def mask_interface(stock: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' function that makes a mask, but for forests."""

    def mask(*args: Any, mask_function: MaskFunction, config: Any = None, **options: Any) -> Any:
        forest_pass = running()
        if forest_pass is None:
            return stock(*args, mask_function=mask_function, config=config, **options)
        named = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        sizes = [size for size in (options.get("local_size"), *named) if isinstance(size, int) and size > 0]
        return forest_pass.mask(mask_function, sizes, options["device"])

    return mask


def kind_of_mask(mask_function: MaskFunction, sizes: list[int], device: torch.device) -> tuple[int | None, int | None]:
    """Window and chunk of a mask, found by asking it about pairs of positions at and around all sizes in question.

    Raises:
        ModelError: it is neither causal nor causal with a window or chunks of one of `sizes`.
    """
    places = {0, 1, *(place for size in sizes for k in (1, 2, 3) for place in range(k * size - 2, k * size + 3))}
    places |= {2**power + offset for power in range(1, 21) for offset in (-1, 0, 1)}
    asked = sorted(place for place in places if place >= 0)
    query_N1, key_1N = torch.tensor(asked, device=device)[:, None], torch.tensor(asked, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.long, device=device)
    found = mask_function(zero, zero, query_N1, key_1N).expand(len(asked), len(asked)).tolist()
    for window, chunk in ((None, None), *((size, None) for size in sizes), *((None, size) for size in sizes)):
        if found == [[_sees(query, key, window, chunk) for key in asked] for query in asked]:
            return window, chunk
    raise ModelError("its attention mask is neither causal nor causal with a sliding window or chunks")


def _sees(query: int, key: int, window: int | None, chunk: int | None) -> bool:
    near = window is None or query - key < window
    return key <= query and near and (chunk is None or query // chunk == key // chunk)
