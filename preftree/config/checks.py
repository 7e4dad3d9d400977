"""Checks of values that add what they find to a list of problems, so that all are reported at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from preftree.config.sizes import size_in_bytes
from preftree.errors import SettingsError, did_you_mean


def one_of(problems: list[str], name: str, value: str, allowed: Collection[str]) -> None:
    """Add a problem unless `value` is one of `allowed`."""
    if value not in allowed:
        near = did_you_mean(str(value), allowed, limit=1)
        problems.append(f"--{name} must be one of {', '.join(allowed)}. Got {value!r} instead.{near}")


def within(
    problems: list[str],
    name: str,
    value: float | None,
    low: float,
    high: float = float("inf"),
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Add a problem unless low ≤ value ≤ high (`above`, `below`: strictly) and finite; None is always fine."""
    if value is None:
        return
    fits_low = value > low if above else value >= low
    fits_high = value < high if below or high == float("inf") else value <= high
    if not (fits_low and fits_high):  # written so that NaN does not fit
        text = f"above {low:g}" if above else f"at least {low:g}"
        if high != float("inf"):
            text += f" and {'below' if below else 'at most'} {high:g}"
        elif value == high:
            text += " and finite"
        problems.append(f"--{name} must be {text}. Got {value} instead.")


def memory_size(problems: list[str], name: str, value: str | None) -> None:
    """Add a problem unless `value` is an amount of memory; None is always fine."""
    try:
        _ = None if value is None else size_in_bytes(value)
    except ValueError:
        problems.append(f"--{name} {value}: write a number and a unit, such as 2GB or 1500MiB.")


def refuse(problems: Sequence[str]) -> None:
    """Raise SettingsError with all `problems`, if there are any."""
    if problems:
        raise SettingsError(*problems)
