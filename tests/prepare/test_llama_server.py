"""The engine for servers against a real one: llama-cpp-python's, with the bundled model. `make test-server`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
import yaml

from tests.support.prepare import command

PATIENCE = 300  # seconds until the server has loaded the model


@pytest.fixture(scope="module")
def server(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A llama.cpp server's address. LLAMA_PYTHON is an interpreter that has llama-cpp-python[server]."""
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp.server"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python[server] is not installed: make test-server builds it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (gguf,) = smollm2_folder.glob("*.gguf")
    words = ["-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port), "--n_ctx", "1024"]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as out, subprocess.Popen([python, *words], stdout=out, stderr=subprocess.STDOUT) as process:
        url = f"http://127.0.0.1:{port}/v1"
        try:
            until = time.monotonic() + PATIENCE
            while not _answers(url):
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return urllib3.request("GET", f"{url}/models", retries=False, timeout=2).status == 200
    except urllib3.exceptions.HTTPError:
        return False


@pytest.mark.llama_server
def test_rejected_answers_from_a_real_server(server: str, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = samples / "pref" / "openorca_questions.jsonl"
    flags = [
        "--dataset_name",
        str(source),
        "--model_name_or_path",
        "smollm2",
        "--engine",
        "openai",
        "--base_url",
        server,
    ]
    flags += [
        "--tokenizer_name",
        "smollm2",
        "--output_dir",
        str(out),
        "--num_samples",
        "8",
        "--max_prompt_length",
        "200",
    ]
    flags += ["--max_new_tokens", "24", "--cut_answers", "keep", "--concurrency", "2", "--timeout", "300"]
    command(*flags)
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    counts = yaml.safe_load((out / "manifest.yaml").read_text())["counts"]
    assert len(rows) == 8 - sum(counts["given_up"].values()) >= 6
    assert not [reason for reason in counts["answers_refused"] if "server" in reason]
    for row in rows:
        assert row["rejected"].strip()
        assert row["rejected_finish"] in ("stop", "length")
    assert len({row["rejected"] for row in rows}) == len(rows)
