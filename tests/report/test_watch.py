"""`preftree watch`: new points without reloading, nothing but reading, to this machine only."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from preftree.config.watch import WatchSettings
from preftree.errors import RunError, SettingsError
from preftree.io.run_folder import RunFolder
from preftree.report.watch import LOOPBACK, serve
from tests.report.conftest import write_run


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A run that goes on, and the port on which it is watched."""
    run = write_run(tmp_path, steps=4, finished=False)
    with serve(WatchSettings([str(run)], port=0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield run, int(server.server_address[1])
        server.shutdown()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer, answer.read().decode()


def test_the_page_asks_for_its_newer_self(watched: tuple[Path, int]) -> None:
    run, port = watched
    answer, text = ask(port)
    assert answer.status == 200
    assert text.count("<script>") == 1
    assert 'fetch("/live"' in text
    first, inside = ask(port, "/live")
    assert "The run is not finished: step 4" in inside
    assert "<html" not in inside
    again, nothing = ask(port, "/live", If_None_Match=str(first.headers["ETag"]))
    assert (again.status, nothing) == (304, "")
    RunFolder(run).log({"step": 9, "loss": 0.1, "rewards/margins": 1.0, "rewards/accuracies": 1.0,
                        "rewards/chosen": 0.1, "rewards/rejected": -0.9})  # fmt: skip
    newer, text = ask(port, "/live", If_None_Match=str(first.headers["ETag"]))
    assert newer.status == 200
    assert "step 9" in text


def test_nothing_can_be_written_and_no_file_be_named(watched: tuple[Path, int]) -> None:
    run, port = watched
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(port, "/", method)[0].status == 501
    for path in ("/run/config.json", "/../../etc/passwd", "//etc/passwd", "/%2e%2e/x", "/live/..", "/?x"):
        assert ask(port, path)[0].status == 404
    assert ask(port, method="HEAD")[1] == ""
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_it_is_for_this_machine_only(watched: tuple[Path, int]) -> None:
    _, port = watched
    assert ask(port, Host="evil.example")[0].status == 403
    assert ask(port, Host=f"evil.example:{port}")[0].status == 403
    assert ask(port, Host=f"localhost:{port}")[0].status == 200
    assert "default-src 'none'" in str(ask(port)[0].headers["Content-Security-Policy"])


def test_a_run_that_is_deleted_meanwhile_is_a_message(watched: tuple[Path, int]) -> None:
    run, port = watched
    (run / "run/config.json").unlink()
    answer, text = ask(port)
    assert answer.status == 503
    assert "no training run here" in text


def test_mistakes_are_named(tmp_path: Path, watched: tuple[Path, int]) -> None:
    run, port = watched
    with pytest.raises(RunError, match="no training run here"):
        serve(WatchSettings([str(tmp_path)], port=0))
    with pytest.raises(RunError, match=f"--port {port} cannot be served"):
        serve(WatchSettings([str(run)], port=port))
    with pytest.raises(SettingsError, match="name the run"):
        WatchSettings([])
