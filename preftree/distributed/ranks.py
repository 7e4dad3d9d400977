"""The processes that train together: what they agree on, what they reduce, and what is said when one is lost.

Trainer and accelerate would wrap the model in DistributedDataParallel. Its hooks reduce gradients while `forward`
of the wrapper is followed by one backward pass; here a step is many backward passes through
`leaf_logprobs(scorer, forest)`, and only LoRA has gradients. So they are summed by one all-reduce of one flat
bucket after the last backward pass: the bytes of one `no_sync` window, exact at any number of forests per rank,
none included, and the same beside a sharded base model (`model/shard.py`).

Two groups of processes: gradients travel by the device's own backend (NCCL, HCCL, gloo), counts and reference
log-probs by gloo on the CPU, so that agreeing never waits for the device.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from preftree.errors import RunError


class Ranks:
    """The ranks of this run; without a process group a single rank, for which everything below does nothing.

    Args:
        timeout: seconds to wait for the other ranks.
        device: what gradients are on; on the CPU both groups are one.
        lockstep: all ranks must make the same number of forward and backward passes (a sharded base model).
    """

    def __init__(self, timeout: float = 1800, device: str = "cpu", lockstep: bool = False) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.index = dist.get_rank() if several else 0
        self.count = dist.get_world_size() if several else 1
        self.lockstep = lockstep and self.count > 1
        self._control = self._data = None
        if self.count > 1:
            self._control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
            self._data = self._control if device == "cpu" else dist.group.WORLD

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The same few whole numbers of every rank, by rank."""
        mine = torch.tensor(list(numbers), dtype=torch.int64)
        if self.count == 1:
            return [mine.tolist()]
        everyones = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyones, mine, group=self._control)
        return [numbers_.tolist() for numbers_ in everyones]

    def gather_bytes(self, content: Tensor) -> list[Tensor]:
        """Every rank's own bytes, by rank; they may be of different length."""
        if self.count == 1:
            return [content]
        lengths = [length for (length,) in self.gather([len(content)])]
        padded = content.new_zeros(max(lengths))
        padded[: len(content)] = content
        everyones = [torch.empty_like(padded) for _ in lengths]
        if len(padded):
            dist.all_gather(everyones, padded, group=self._control)
        return [content_[:length] for content_, length in zip(everyones, lengths, strict=True)]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, the same bits on every rank; one bucket per dtype."""
        self._in_buckets(tensors, lambda bucket: dist.all_reduce(bucket, group=self._data))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the first rank's."""
        self._in_buckets(tensors, lambda bucket: dist.broadcast(bucket, src=0, group=self._data))

    @torch.no_grad()
    def _in_buckets(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
        if self.count == 1:
            return
        for dtype in {tensor.dtype: None for tensor in tensors}:  # a dict keeps the order, the same on every rank
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            bucket = torch.cat([tensor.reshape(-1) for tensor in same])
            exchange(bucket)
            for tensor, result in zip(same, bucket.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(result.view_as(tensor))

    def check_same(self, what: str, text: str) -> None:
        """Raise RunError unless all ranks come with the same text (a fingerprint of weights, data, settings)."""
        if self.count == 1:
            return
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        words = [bytes(word.tolist()) for word in self.gather_bytes(content)]
        if others := [str(rank) for rank, word in enumerate(words) if word != words[0]]:
            raise RunError(
                f"the ranks do not have the same {what}: rank {', '.join(others[:8])} differs from rank 0. Give all "
                "hosts the same files and flags."
            )

    @contextmanager
    def explained(self, advice: str) -> Iterator[None]:
        """Turn the failure of an exchange into one sentence; `advice` says how to go on."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_lost_rank(error):
                raise
            raise RunError(
                f"rank {self.index} of {self.count} on {socket.gethostname()}: another rank was lost, or did not "
                f"answer within --ddp_timeout seconds ({_first_line(error)}). {advice}"
            ) from error


def leave() -> None:
    """End this process's part in the group, as the device's backend wants it before the process ends."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _is_lost_rank(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors, whose text alone tells them from a bug."""
    words = ("gloo", "connection closed", "connection reset", "connection refused", "timed out", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
