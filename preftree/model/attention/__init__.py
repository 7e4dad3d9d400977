"""Attention over a forest. One function per backend, all with the signature of `dense.attend`:

    attend(query_HTD, key_KTD, value_KTD, forest, rules) -> out_THD

`dense` is the specification; every other backend is tested against it, outputs and gradients. To add one,
write that function and its line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from preftree.forest import Forest, Stretch
from preftree.model.attention import dense, flex, masked, native, tiles, varlen
from preftree.model.attention.rules import Rules
from preftree.model.cpu.kernels import KERNEL_DTYPES

Attend = Callable[[Tensor, Tensor, Tensor, Forest, Rules], Tensor]
AttendFresh = Callable[[Tensor, Tensor, Tensor, Stretch, Rules], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a forest, and what belongs to it.

    Args:
        attend: see above.
        dtypes: what its kernel computes in; None is any.
        cpu_kernels: the model's other modules get the CPU's compiled kernels as well (`model.cpu`).
        attend_fresh: the same, forward only, for the fresh tokens of a stretch over known and fresh ones.
    """

    attend: Attend
    dtypes: frozenset[torch.dtype] | None = None
    cpu_kernels: bool = False
    attend_fresh: AttendFresh = tiles.attend_fresh

    def computes_in(self, dtype: torch.dtype) -> bool:
        return self.dtypes is None or dtype in self.dtypes


BACKENDS: dict[str, Backend] = {
    "dense": Backend(dense.attend),
    "tiles": Backend(tiles.attend),
    "native": Backend(
        native.attend, dtypes=frozenset(KERNEL_DTYPES), cpu_kernels=True, attend_fresh=native.attend_fresh
    ),
    "masked": Backend(masked.attend),
    "flex": Backend(flex.attend),
    "varlen": Backend(varlen.attend),
}

FOR_DEVICE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "tiles"),
    "cuda": ("varlen", "flex", "masked"),
}
"""What to try on a device, the likely fastest first; on any other it is `masked`, which needs no kernel of ours."""

MEASURED = {"cuda"}
"""Devices on which the order depends on the card and the model, so that all that agree are timed."""

__all__ = ["BACKENDS", "FOR_DEVICE", "MEASURED", "Attend", "AttendFresh", "Backend", "Rules"]
