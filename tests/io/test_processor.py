"""A processor's name says which one it is, also where a virtual machine leaves that out."""

from __future__ import annotations

import platform

import pytest

from preftree.io import processor


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"model name": "AMD EPYC", "cpu family": "25", "model": "17"}, "AMD EPYC (family 25, model 17)"),
        ({"model name": "AMD EPYC", "cpu family": "26", "model": "2"}, "AMD EPYC (family 26, model 2)"),
        ({"CPU part": "0xd40"}, platform.processor() or platform.machine()),
        ({}, platform.processor() or platform.machine()),
    ],
)
def test_the_name(said: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpuinfo", lambda: said)
    assert processor.processor_name() == name
