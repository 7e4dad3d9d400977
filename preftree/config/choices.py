"""Choices that several commands offer."""

from __future__ import annotations

PAIR_RULES = ("best_worst", "best_each", "all")
"""The names of `preftree.data.record.PAIR_RULES`, here so that parsing flags needs no data code."""
