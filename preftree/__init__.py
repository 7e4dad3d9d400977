"""preftree: preference optimization over token trees, every prompt computed once.

What is exported is imported when it is first used, so that `import preftree` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftree.api import check, compare, evaluate, prepare
    from preftree.data.sources import load_pairs
    from preftree.forest import Bundle, Forest
    from preftree.model.score import attach, leaf_logprobs
    from preftree.train.collator import DataCollatorForPreference
    from preftree.train.config import DPOConfig
    from preftree.train.trainer import DPOTrainer

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForPreference",
    "Forest",
    "__version__",
    "attach",
    "check",
    "compare",
    "evaluate",
    "leaf_logprobs",
    "load_pairs",
    "prepare",
]

_EXPORTS = {
    "Bundle": "preftree.forest",
    "DPOConfig": "preftree.train.config",
    "DPOTrainer": "preftree.train.trainer",
    "DataCollatorForPreference": "preftree.train.collator",
    "Forest": "preftree.forest",
    "attach": "preftree.model.score",
    "compare": "preftree.api",
    "leaf_logprobs": "preftree.model.score",
    "load_pairs": "preftree.data.sources",
}
#: Packages that are functions of the API as well.
_CALLABLE = ("check", "evaluate", "prepare")


class CallablePackage(ModuleType):
    """A package of a stage that is also the function of the same name in `preftree.api`."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        stage = getattr(import_module("preftree.api"), self.__name__.rpartition(".")[2])
        return stage(*args, **settings)


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
