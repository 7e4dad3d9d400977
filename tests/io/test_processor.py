"""A processor's name says which one it is, also where a virtual machine leaves that out."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from preftree.io import processor
from preftree.model.cpu import kernels


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


def test_all_entries_and_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine with two kinds of processors, and the entry without a processor that some Arm machines end with."""
    text = "processor\t: 0\nCPU part\t: 0xd05\n\nprocessor\t: 1\nCPU part\t: 0xd41\n\nHardware\t: a board: new\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    processor.all_cpuinfo.cache_clear()
    try:
        assert processor.all_cpuinfo() == [
            {"processor": "0", "CPU part": "0xd05"},
            {"processor": "1", "CPU part": "0xd41"},
            {"Hardware": "a board: new"},
        ]
        assert processor.cpuinfo()["CPU part"] == "0xd05"
        assert "0xd41" in kernels._processor()
    finally:
        processor.all_cpuinfo.cache_clear()
