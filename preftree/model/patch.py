"""What is replaced in a model while it is attached, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_OPEN = "_preftree_patches"


class Patches:
    """Replacements in one model's modules, undone together, the last one first.

    The record lives on the model itself, so that a model knows whether it is patched and a copy of it has a record of
    its own. Patches of one model may be nested; the inner ones are undone first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.undone = False
        self._undo: list[Callable[[], Any]] = []
        self._outer = Patches.of(model)
        model.__dict__[_OPEN] = self

    @classmethod
    def of(cls, model: nn.Module) -> Patches | None:
        """What is patched in `model` now, None if nothing is."""
        found: Patches | None = model.__dict__.get(_OPEN)
        return found

    def forward(self, module: nn.Module, replacement: Callable[..., Any]) -> None:
        """Replace a module's forward."""
        self.method(module, "forward", replacement)

    def method(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        """Replace one of a module's methods."""
        before = module.__dict__.get(name)
        module.__dict__[name] = replacement
        self.on_undo(_Restored(module, name, before))

    def on_undo(self, step: Callable[[], Any]) -> None:
        """Have `step` called when everything is put back."""
        self._undo.append(step)

    def undo(self) -> None:
        """Put everything back; the second time does nothing."""
        while self._undo:
            self._undo.pop()()
        if Patches.of(self.model) is self:
            self.model.__dict__[_OPEN] = self._outer
        self.undone = True


def undo_patches(model: nn.Module) -> None:
    """Put `model` back as it is without any patches."""
    while (patches := Patches.of(model)) is not None:
        patches.undo()


class _Restored:
    """Gives a module the method that it had; an object, so that a copy of the model gets a copy of it."""

    def __init__(self, module: nn.Module, name: str, before: Callable[..., Any] | None) -> None:
        self.module, self.name, self.before = module, name, before

    def __call__(self) -> None:
        if self.before is None:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = self.before
