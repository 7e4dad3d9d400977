"""Backend hccl: gloo under another name."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from habana_frameworks.torch import calls


def _group(store: Any, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    calls["hccl groups"] += 1
    return dist.ProcessGroupGloo(store, rank, size, timeout)


dist.Backend.register_backend("hccl", _group, devices=["cpu", "hpu"])
