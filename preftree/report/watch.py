"""`preftree watch RUN…`: the report's page while runs go on, on the loopback interface and read only.

The page asks every two seconds for what is inside it, by a tag made of the run folders' files; while nothing has
changed the answer is empty and nothing is drawn. Only GET and HEAD are answered, and only two paths: no request names
a file. A request under another host's name is refused, so that no web page elsewhere can read the runs through a
browser (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.console import Console

from preftree.config.watch import WatchSettings
from preftree.errors import RunError
from preftree.io.console import sayer
from preftree.report.page import body, page
from preftree.report.read import read_runs

LOOPBACK = "127.0.0.1"
#: Where the page asks for its newer self.
_LIVE = "/live"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class WatchedRuns:
    """Runs with their page, drawn anew only when a file has changed; one request draws at a time.

    Raises:
        RunError: a folder holds no run.
    """

    def __init__(self, runs: Sequence[str]) -> None:
        self.runs = list(runs)
        self._lock = threading.Lock()
        self._drawn: dict[str, tuple[str, str]] = {}
        read_runs(self.runs)

    def tag(self) -> str:
        """A hash of sizes and times of all files that a report reads."""
        digest = hashlib.sha256()
        for run in self.runs:
            for path in sorted((Path(run) / "run").glob("*")):
                status = path.stat()
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns};".encode())
        return f'"{digest.hexdigest()[:16]}"'

    def text(self, path: str) -> tuple[str, str]:
        """The tag and the text of a path."""
        with self._lock:
            tag = self.tag()
            if self._drawn.get(path, ("", ""))[0] != tag:
                runs = read_runs(self.runs)
                drawn = body(runs, None, None) if path == _LIVE else page(runs, None, None, live=_LIVE)
                self._drawn[path] = (tag, drawn)
            return self._drawn[path]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, watched: WatchedRuns) -> None:
        self.watched = watched
        super().__init__((LOOPBACK, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; every other method is answered by 501, as the base class does."""

    server: _Server
    server_version, sys_version = "preftree", ""

    def do_GET(self) -> None:
        """The page, or what is inside it."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in (LOOPBACK, "localhost"):
            return self._answer(HTTPStatus.FORBIDDEN, b"this is served to this machine only\n")
        if self.path not in ("/", _LIVE):
            return self._answer(HTTPStatus.NOT_FOUND, b"there is / and nothing else\n")
        try:
            tag, text = self.server.watched.text(self.path)
        except (RunError, OSError) as problem:  # a file that is being replaced, or a run that was deleted
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{problem}\n".encode())
        if self.headers.get("If-None-Match") == tag:
            return self._answer(HTTPStatus.NOT_MODIFIED, b"", tag)
        return self._answer(HTTPStatus.OK, text.encode("utf-8", errors="backslashreplace"), tag, "text/html")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, content: bytes, tag: str = "", kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal belongs to the training beside it."""


def serve(settings: WatchSettings) -> _Server:
    """A server that is ready to answer.

    Raises:
        RunError: a folder holds no run, or the port is taken.
    """
    watched = WatchedRuns(settings.runs)
    try:
        return _Server(settings.port, watched)
    except OSError as problem:
        why = problem.strerror or problem
        raise RunError(f"--port {settings.port} cannot be served ({why}). Give another, or 0 for a free one.") from None


def watch(settings: WatchSettings, console: Console | None = None) -> None:
    """Serve until interrupted."""
    with serve(settings) as server:
        say = sayer(console or Console())
        say(f"watch      http://{LOOPBACK}:{server.server_address[1]}/  ({', '.join(settings.runs)}); Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("watch      ended")
