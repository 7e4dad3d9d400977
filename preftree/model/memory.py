"""Out of memory, on any device."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, so that the same work in smaller pieces may succeed?

    On the CPU torch raises a plain RuntimeError, which only its words tell from others; accelerate knows them.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)
