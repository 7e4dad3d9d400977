"""What is kept about the machine explains a result and names nobody."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

import pytest
import torch

from preftree.hardware.environment import environment


def test_environment_names_the_machine_and_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = environment()
    text = json.dumps(found)
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert (Path(__file__).parents[2] / ".git").exists() == bool(found["commit"])
    assert found["memory_gib"] > 0
    assert "hf_secret" not in text
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text
