"""Damage that texts take on their way: broken encodings, control characters, lone surrogates."""

from __future__ import annotations

import re

MOJIBAKE = "mojibake (UTF-8 read as another encoding)"
REPLACED = "characters lost in decoding (U+FFFD)"
CONTROL = "control characters"
SURROGATE = "lone surrogates (no valid Unicode)"

# Everything below space but tab, newline and carriage return; DEL; the C1 controls; non-characters.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# The first two bytes of a UTF-8 sequence as Latin-1 or Windows-1252 show them. A cheap sign: what it finds
# ftfy's heuristics look at, which take a hundred times as long.
_CP1252_HIGH = bytes(b for b in range(0x80, 0xA0) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)).decode("cp1252")
_SIGN = re.compile(f"[\u00c2-\u00f4][\u0080-\u00bf{_CP1252_HIGH}]")
_AROUND = 40
_PLAIN = bytes(range(0x20, 0x7F)) + b"\t\n\r"


def damage(text: str) -> list[str]:
    """The kinds of damage in `text` (the constants of this module), in a fixed order; empty for a sound text."""
    # Deleting bytes is ten times as fast as searching with a pattern, and leaves little to search in.
    odd = text.encode("utf-8", "surrogatepass").translate(None, _PLAIN).decode("utf-8", "surrogatepass")
    if not odd:
        return []
    found = []
    if _SIGN.search(odd) and _is_mojibake(text):
        found.append(MOJIBAKE)
    elif _CONTROL.search(odd):  # in mojibake, C1 controls are a part of the same damage
        found.append(CONTROL)
    if "\ufffd" in odd:
        found.append(REPLACED)
    if _SURROGATE.search(odd):
        found.append(SURROGATE)
    return found


def repaired(text: str) -> str:
    """`text` with its encoding undone where that is certain, and without control characters and surrogates.

    What was lost (U+FFFD) stays lost. A sound text comes back as it is.
    """
    kinds = damage(text)
    if MOJIBAKE in kinds:
        import ftfy

        text = ftfy.fix_encoding(text)
    if SURROGATE in kinds:
        text = _SURROGATE.sub("", text)
    return _CONTROL.sub("", text) if kinds else text


def _is_mojibake(text: str) -> bool:
    signs = list(_SIGN.finditer(text))
    if not signs:
        return False
    from ftfy.badness import is_bad

    end = 0
    for sign in signs:
        if sign.start() >= end:
            end = sign.end() + _AROUND
            if is_bad(text[max(sign.start() - _AROUND, 0) : end]):
                return True
    return False
