"""Secrets in texts that are shown or kept: passwords in addresses, and tokens by their well-known beginnings."""

from __future__ import annotations

import re

#: What stands in place of a secret.
REDACTED = "<redacted>"

_IN_ADDRESS = re.compile(r"(\w://)[^\s/@]+@")
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-)[\w-]{6,}")


def redacted(text: str) -> str:
    """The text without passwords in addresses and without tokens."""
    return _TOKEN.sub(REDACTED, _IN_ADDRESS.sub(rf"\1{REDACTED}@", text))
