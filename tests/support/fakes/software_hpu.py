"""A device `hpu` in software: tensors that say they are there and cannot be used beside the CPU's by mistake.

Tensors of this device are wrappers around the CPU's. Every operation on them is run on what they wrap and wrapped
again, so the numbers are the CPU's own, but an operation that finds tensors of both devices is an error, as on a card,
and whatever makes the host wait for the device is noted. The device is made in Python alone (torch has an experimental
interface for that) and lasts as long as the process: import this in a process of its own.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "hpu"
#: Copies, the only operations that may have both devices at once.
COPIES = ("_to_copy", "copy_")

_TORCH = str(Path(torch.__file__).parent)

#: What made the host wait since this was last cleared: the operation, and the function outside torch it came from.
waits: list[str] = []


class MixedDevices(RuntimeError):
    """An operation was given tensors of the host and of the device."""


class HpuTensor(Tensor):
    """A tensor on the device; `inner` is what it holds, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> HpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"HpuTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Torch's own refuses every class but Tensor."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name in COPIES:
            return _copy(name, func, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.dim() and not isinstance(x, HpuTensor) for x in tensors):
            raise MixedDevices(f"{func}: tensors of the CPU and of {NAME} in one operation: {tensors}")
        if _reads(func, tensors):
            _note(name)
        if "device" in kwargs:  # *_like and new_*; None is the device of the tensor given
            kwargs["device"], place = "cpu", kwargs["device"] or NAME
            if torch.device(place).type == "cpu":
                return func(*_inner(args), **_inner(kwargs))
        out = tree_map_only(Tensor, HpuTensor, func(*_inner(args), **_inner(kwargs)))
        if any(x.inner.shape != x.shape for x in tensors if isinstance(x, HpuTensor)):
            raise NotImplementedError(f"{func} gives a tensor another shape in place, which a wrapper cannot follow")
        return return_and_correct_aliasing(func, args, kwargs, out)


def _inner(value: Any) -> Any:
    return tree_map_only(HpuTensor, lambda x: x.inner, value)


def _reads(func: Any, tensors: list[Tensor]) -> bool:
    """Whether the operation's answer, or its shape, depends on numbers that only the device knows."""
    if func.overloadpacket.__name__.startswith(("index", "_index")):  # only a mask has to be counted first
        return any(x.dtype == torch.bool for x in tensors[1:2])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _copy(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    if name == "copy_":
        target = args[0]
        if not isinstance(target, HpuTensor):
            _note("copy_ to the CPU")
        func(*_inner(args), **kwargs)
        return target
    place = torch.device(kwargs.pop("device", None) or NAME)
    out = func(*_inner(args), **kwargs)
    if place.type == "cpu":
        _note("copy to the CPU")
        return out
    return HpuTensor(out)


def _note(what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    callers = [frame.name for frame in frames if not frame.filename.startswith(_TORCH)]
    waits.append(f"{what} in {callers[-1] if callers else 'torch'}")


class _Module(_DummyBackendModule):
    """What torch, and its compiler in any test that runs later in this process, ask of `torch.hpu`."""

    Stream, Event = torch.Stream, torch.Event

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        _note("synchronize")


def _maker(function: Any) -> Any:
    def made(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return HpuTensor(function(*args, **kwargs))

    return made


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Where torch copies without asking the tensors' class: `torch.tensor(…, device="hpu")`."""
    _inner(target).copy_(_inner(source))
    return target


_setup_privateuseone_for_python_backend(NAME, _Module())
_library = torch.library.Library("aten", "IMPL")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
# All that makes a tensor out of nothing comes down to the first two, but for arange, which would make an empty one
# and resize it.
for _name in ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"):
    _library.impl(_name, _maker(getattr(torch, _name.partition(".")[0])), "PrivateUse1")
