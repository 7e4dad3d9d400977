"""The engine for servers against one that misbehaves: slow, busy, broken, cutting connections, talking nonsense."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from preftree.config.prepare import parse_settings
from preftree.errors import RunError, SettingsError
from preftree.model.generate import Answer
from preftree.prepare.engines import server as engine_module
from preftree.prepare.generate import Request

KEY = "sk-a-key-that-nobody-may-see"


class Misbehaving(ThreadingHTTPServer):
    """A chat completions server that first does what `faults` says for each question, then answers.

    An answer is a function of the question and the seed, as a deterministic model's is.
    """

    daemon_threads = True

    def __init__(self, faults: Callable[[str, int], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults = faults
        self.tries: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        """Cut connections are meant here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Misbehaving

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.guard:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
            self.server.tries[question] += 1
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
            number = self.server.tries[question]
        try:
            self.misbehave(self.server.faults(question, number), question, body["seed"])
        finally:
            with self.server.guard:
                self.server.busy -= 1

    def misbehave(self, fault: str, question: str, seed: int) -> None:
        content = {"role": "assistant", "content": f" {question} {seed} "}
        answer = json.dumps({"choices": [{"message": content, "finish_reason": "stop"}]})
        status, _, retry_after = fault.partition(" retry after ")
        if status.isdigit():
            self.send(int(status), json.dumps({"error": {"message": f"no, and your key is {KEY}"}}), retry_after)
        elif fault == "slow":
            threading.Event().wait(1.0)  # not time.sleep, which the tests shorten
            self.send(200, answer)
        elif fault == "cut at once":
            self.close_connection = True
            self.connection.close()
        elif fault == "cut in the middle":
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer[: len(answer) // 2].encode())
            self.close_connection = True
        elif fault == "length":
            self.send(200, answer.replace('"stop"', '"length"'))
        elif fault.startswith("says "):
            self.send(200, fault.removeprefix("says "))
        else:
            self.send(200, answer)

    def send(self, status: int, text: str, retry_after: str = "") -> None:
        self.send_response(status)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(faults: Callable[[str, int], str]) -> Iterator[Misbehaving]:
    with Misbehaving(faults) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses' lengths are urllib3's business; here they are cut to a hundredth."""
    real = time.sleep
    monkeypatch.setattr("urllib3.util.retry.time.sleep", lambda seconds: real(seconds / 100))
    monkeypatch.setenv("A_KEY", KEY)


def engine(server: Misbehaving, *flags: str):
    base = ["--dataset_name", "D", "--output_dir", "O", "--engine", "openai", "--tokenizer_name", "smollm2"]
    base += ["--model_name_or_path", "weak", "--base_url", server.url, "--api_key_env", "A_KEY"]
    return engine_module.make(parse_settings([*base, "--timeout", "0.5", "--max_retries", "4", *flags]))


def ask(question: str, seed: int = 5) -> list[Request]:
    return [Request([{"role": "user", "content": question}], seed)]


NONSENSE = ["{", "[]", '{"choices": []}', '{"choices": [{"message": null}]}', "<html>", ""]
FAULTS = [
    "429 retry after 0",
    "429 retry after soon",
    "500",
    "503",
    "408",
    "slow",
    "cut at once",
    "cut in the middle",
    *(f"says {text}" for text in NONSENSE),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_waited_for(fault: str) -> None:
    with serving(lambda question, number: fault if number <= 2 else "") as server:
        assert engine(server)(ask("why")) == [Answer("why 5", True)]
        assert server.tries["why"] == 3
        assert server.bodies[0] == server.bodies[-1]


def test_the_server_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", slept.append)
    with serving(lambda question, number: "503 retry after 90" if number <= 2 else "") as server:
        assert engine(server)(ask("why")) == [Answer("why 5", True)]
    assert slept == [90, 90]


def test_what_is_sent() -> None:
    with serving(lambda question, number: "") as server:
        engine(server, "--temperature", "0.5", "--top_p", "0.8", "--max_new_tokens", "7")(ask("why", 31))
        engine(server, "--top_k", "9")(ask("why"))
        messages = [{"role": "user", "content": "why"}]
        sent = {"model": "weak", "max_tokens": 7, "temperature": 0.5, "top_p": 0.8, "messages": messages, "seed": 31}
        assert server.bodies[0] == sent
        assert server.bodies[1]["top_k"] == 9
        assert server.keys == {f"Bearer {KEY}"}


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda question, number: "") as server:
        engine(server, "--api_key_env", "OPENAI_API_KEY")(ask("why"))
        assert server.keys == {None}
        monkeypatch.delenv("A_KEY")
        with pytest.raises(SettingsError, match="--api_key_env A_KEY: there is no such variable"):
            engine(server)


def test_an_answer_cut_by_the_limit_is_known_as_such() -> None:
    with serving(lambda question, number: "length") as server:
        assert engine(server)(ask("why")) == [Answer("why 5", False)]


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_prompt_that_is_refused_is_that_prompts_failure(status: str) -> None:
    with serving(lambda question, number: status) as server:
        answer = engine(server)(ask("why"))[0]
        assert answer == Answer("", False, f"the server refused the prompt (HTTP {status})")
        assert server.tries["why"] == 1


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_what_no_prompt_would_change_stops_the_run_and_keeps_the_key(status: str) -> None:
    with serving(lambda question, number: status) as server:
        with pytest.raises(RunError, match=f"HTTP {status}") as raised:
            engine(server)(ask("why"))
        assert KEY not in str(raised.value)
        assert "--base_url" in str(raised.value)
        assert server.tries["why"] == 1


@pytest.mark.parametrize("fault", ["500", "cut at once", "says {"])
def test_an_end_without_answer_says_what_to_do(fault: str) -> None:
    with serving(lambda question, number: fault) as server:
        with pytest.raises(RunError, match="What was answered is kept") as raised:
            engine(server)(ask("why"))
        assert KEY not in str(raised.value)
        assert server.tries["why"] == 5
        assert engine(server, "--skip_failed", "true")(ask("why"))[0].failure == "the request failed to the end"


def test_no_server_at_all() -> None:
    with serving(lambda question, number: "") as server:
        pass
    with pytest.raises(RunError, match="did not answer in 4 repetitions"):
        engine(server)(ask("why"))


def test_many_at_once_through_all_faults() -> None:
    """Sixty questions, each with troubles of its own, eight at a time: every answer comes, to its own question."""
    faults = ["429 retry after 0", "500", "slow", "cut at once", "cut in the middle", "says {", ""]

    def fault(question: str, number: int) -> str:
        return faults[(int(question) + number) % len(faults)] if number <= 2 else ""

    with serving(fault) as server, ThreadPoolExecutor(8) as pool:
        one = engine(server, "--concurrency", "8")
        answers = list(pool.map(lambda number: one(ask(str(number), seed=number))[0], range(60)))
        assert answers == [Answer(f"{number} {number}", True) for number in range(60)]
        assert 1 < server.most_busy <= 8 + 8  # a slow request goes on in the server after its client has left


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base_url", "localhost:8000"], "must begin with http"),
        (["--base_url", "http://me:secret@host/v1"], "user name"),
        ([], "needs --base_url"),
        (["--base_url", "http://x", "--chat_template", "llama-2"], "server's business"),
    ],
)
def test_settings_that_cannot_be_meant(flags: list[str], said: str) -> None:
    base = ["--dataset_name", "D", "--output_dir", "O", "--engine", "openai", "--tokenizer_name", "smollm2"]
    with pytest.raises(SettingsError, match=said) as raised:
        parse_settings([*base, "--model_name_or_path", "weak", *flags])
    assert "secret" not in str(raised.value)
