"""Answers from a server that speaks the OpenAI protocol: vLLM, llama.cpp, TGI, or a service.

A request is repeated, with exponential backoff or after the server's Retry-After, when the server is busy, fails,
closes the connection, takes too long or answers with something that is no chat completion. What the server refuses for
good is the prompt's failure and is recorded; a wrong key, address or model name stops the run.

The `openai` client would not replace this loop: of the faults in tests/prepare/test_server.py it repeats seven and
takes the other seven, HTTP 425 and answers that are no chat completion, as final; and it ignores a Retry-After above
a minute (version 3.57).
"""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, ProtocolError

from preftree.config.prepare import PrepareSettings, ServerSettings
from preftree.errors import RunError
from preftree.model.generate import Answer
from preftree.prepare.generate import Request, Unit

#: Temporary: time-outs and conflicts, too many requests, and everything that is the server's own fault.
_TEMPORARY = frozenset({408, 409, 425, 429, *range(500, 600)})
#: The same for every prompt: key, permission, address or model name, method.
_FATAL = {401: "the key is wrong or missing", 403: "the key may not do this", 404: "no such address or model"}
_FATAL |= {405: "this address takes no requests", 402: "the account is used up"}
#: Flags of prepare that say which server and which model.
_FLAGS = "--base_url, --model_name_or_path"


class ServerEngine:
    """Answers one request after the other; call it from several threads at once.

    Args:
        base_url: up to and including the version.
        body: what every request has in common.
        flags: what to look at where the server refuses all requests.
    """

    def __init__(self, base_url: str, body: dict[str, Any], server: ServerSettings, flags: str = _FLAGS) -> None:
        self.url, self.body, self.flags = base_url.rstrip("/") + "/chat/completions", body, flags
        self.key, self.skip_failed = os.environ.get(server.api_key_env), server.skip_failed
        url, key = self.url, self.key
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.pool = _pool(url, maxsize=server.concurrency, timeout=server.timeout)
        self.retry = urllib3.Retry(
            total=server.max_retries, backoff_factor=0.25, backoff_max=60, backoff_jitter=0.25, allowed_methods=None
        )

    def __call__(self, unit: Unit) -> list[Answer]:
        return [self._answer(request) for request in unit]

    def _answer(self, request: Request) -> Answer:
        body = json.dumps({**self.body, "messages": request.prompt, "seed": request.seed}).encode()
        retry = self.retry
        while True:
            response, error = None, None
            try:
                response = self.pool.request("POST", self.url, body=body, headers=self.headers, retries=False)
                if response.status < 300:
                    return _read(response.data)
                if response.status not in _TEMPORARY:
                    return self._refused(response)
            except HTTPError as problem:
                error = problem
            try:
                retry = retry.increment("POST", self.url, response, error)
            except MaxRetryError as last:
                return self._failed(response, last)
            _pause(retry, response)

    def _refused(self, response: urllib3.BaseHTTPResponse) -> Answer:
        """An answer that will not change: the prompt's failure, or the end of the run."""
        if response.status in _FATAL:
            raise RunError(
                f"The server at {self.url} answers with HTTP {response.status}: {_FATAL[response.status]} "
                f"({self._said(response)}). Look at {self.flags} and the variable that --api_key_env names."
            )
        return Answer("", False, f"the server refused the prompt (HTTP {response.status})")

    def _failed(self, response: urllib3.BaseHTTPResponse | None, last: MaxRetryError) -> Answer:
        if self.skip_failed:
            return Answer("", False, "the request failed to the end")
        said = f"HTTP {response.status}: {self._said(response)}" if response is not None else str(last.reason)
        raise RunError(
            f"The server at {self.url} did not answer in {self.retry.total} repetitions (at last: {said}). What was"
            " answered is kept: start the same command again when the server is well. If one prompt is to"
            " blame, --skip_failed true drops it."
        )

    def _said(self, response: urllib3.BaseHTTPResponse) -> str:
        text = " ".join(response.data.decode("utf-8", "replace").split())[:300]
        return text.replace(self.key, "…") if self.key else text


def make(settings: PrepareSettings) -> ServerEngine:
    """A client for the server of the settings; the key is read from the environment and stays in memory."""
    generate, server = settings.generate, settings.server
    body = {
        "model": generate.model_name_or_path,
        "max_tokens": generate.max_new_tokens,
        "temperature": generate.temperature,
        "top_p": generate.top_p,
    }
    if generate.top_k:
        body["top_k"] = generate.top_k  # not in OpenAI's own protocol, hence only when asked for
    return ServerEngine(server.base_url or "", body, server)


def _pool(url: str, maxsize: int, timeout: float) -> urllib3.PoolManager:
    """Through the environment's proxy where there is one for this host."""
    parts = urllib3.util.parse_url(url)
    proxy = None
    if not urllib.request.proxy_bypass(parts.host or ""):
        proxy = urllib.request.getproxies().get(parts.scheme or "")
    options: dict[str, Any] = {"maxsize": maxsize, "block": True, "timeout": urllib3.Timeout(timeout)}
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _pause(retry: urllib3.Retry, response: urllib3.BaseHTTPResponse | None) -> None:
    """As long as the server's Retry-After says, else exponential backoff."""
    try:
        retry.sleep(response)
    except InvalidHeader:  # a Retry-After that is neither seconds nor a date
        retry.sleep()


def _read(data: bytes) -> Answer:
    """The first choice of a chat completion. Raises ProtocolError where that is not what was sent."""
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"] or ""
        return Answer(text.strip(), choice.get("finish_reason") != "length")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ProtocolError(f"no chat completion in the answer: {data[:80]!r}") from error
