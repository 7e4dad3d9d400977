"""What writes the rejected answers. An engine is made where the work is done, and called with units of requests.

    local.py    transformers, on this machine's CPU or accelerator
    vllm.py     vLLM's offline engine
    server.py   any server that speaks the OpenAI protocol

To add one, write its `make` and name it in `make_engine` and in `ENGINES` of the settings.
"""

from __future__ import annotations

from preftree.config.prepare import PrepareSettings
from preftree.prepare.generate import Engine


def make_engine(settings: PrepareSettings) -> Engine:
    """The engine that the settings name, ready to answer. Imports only what that engine needs."""
    if settings.generate.engine == "openai":
        from preftree.prepare.engines import server

        return server.make(settings)
    if settings.generate.engine == "vllm":
        from preftree.prepare.engines import vllm

        return vllm.make(settings)
    from preftree.prepare.engines import local

    return local.make(settings)
