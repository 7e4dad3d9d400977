"""The documentation as a site, where MkDocs is installed: it builds without a warning, and has the generated pages."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from preftree.cli import PARSERS

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(find_spec("material") is None, reason="MkDocs is not here: pip install 'preftree[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    flags = (tmp_path / "site/flags.html").read_text("utf-8")
    assert all(f"preftree {name}" in flags for name in PARSERS)
    assert "--sample_prompts" in flags
    reference = (tmp_path / "site/reference.html").read_text("utf-8")
    assert "DPOTrainer" in reference
    assert "Trains a causal language model on preference pairs" in reference
    assert "../README.md" not in (tmp_path / "site/index.html").read_text("utf-8")
