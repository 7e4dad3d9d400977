"""Whether the Hugging Face hub can be reached, asked once and at once, before its client retries in silence."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


def hub_host() -> str:
    """The hub's host name; HF_ENDPOINT names another one."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "huggingface.co"


def hub_reachable() -> bool:
    """Does the hub's host have an address here? Behind a proxy the name need not resolve."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(hub_host(), 443)
    except OSError:
        return False
    return True


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Switches the hub client offline while its host has no address: it then looks in its cache and fails at once,
    where it would first retry for more than a minute. Yields whether it was switched."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or hub_reachable():
        yield False
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield True
    finally:
        constants.HF_HUB_OFFLINE = False
