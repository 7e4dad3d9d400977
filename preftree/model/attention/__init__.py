"""Attention over a forest. One function a backend, all with the signature of `dense.attend`:

    attend(query_HTD, key_KTD, value_KTD, forest, rules) -> out_THD

`dense` is the specification; every other backend is tested against it, outputs and gradients. To add one,
write that function and its line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from preftree.forest import Forest
from preftree.model.attention import cpu, dense, flex, masked, native, varlen
from preftree.model.attention.rules import Rules

Attend = Callable[[Tensor, Tensor, Tensor, Forest, Rules], Tensor]

BACKENDS: dict[str, Attend] = {
    "dense": dense.attend,
    "cpu": cpu.attend,
    "native": native.attend,
    "masked": masked.attend,
    "flex": flex.attend,
    "varlen": varlen.attend,
}

FOR_DEVICE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "cpu"),
    "cuda": ("varlen", "flex", "masked"),
}
"""What to try on a device, the likely fastest first; on any other it is `masked`, which needs no kernel of ours."""

MEASURED = {"cuda"}
"""Devices on which the order depends on the card and the model, so that all that agree are timed."""

__all__ = ["BACKENDS", "FOR_DEVICE", "MEASURED", "Attend", "Rules"]
