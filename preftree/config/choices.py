"""Choices that several commands offer. Names only, so that parsing needs nothing heavy."""

from __future__ import annotations

#: Precisions of weights and computation.
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: The names of `preftree.data.record.PAIR_RULES`.
PAIR_RULES = ("best_worst", "best_each", "all")
#: The rule that keeps all answers of a prompt as one ranked list, for losses of lists.
LIST_RULE = "list"
#: The names of devices that --device takes.
DEVICES = ("auto", "cpu", "cuda", "hpu", "mps", "xpu")
