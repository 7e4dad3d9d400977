"""preftree: preference optimization over token trees, every prompt computed once.

What is exported is imported when it is first used, so that `import preftree` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftree.forest import Bundle, Forest
    from preftree.model.score import attach, leaf_logprobs
    from preftree.train.collator import DataCollatorForPreference
    from preftree.train.config import DPOConfig
    from preftree.train.trainer import DPOTrainer

__version__ = "0.1.0"

_EXPORTS = {
    "Bundle": "preftree.forest",
    "DPOConfig": "preftree.train.config",
    "DPOTrainer": "preftree.train.trainer",
    "DataCollatorForPreference": "preftree.train.collator",
    "Forest": "preftree.forest",
    "attach": "preftree.model.score",
    "leaf_logprobs": "preftree.model.score",
}

__all__ = [
    "Bundle",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForPreference",
    "Forest",
    "__version__",
    "attach",
    "leaf_logprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
