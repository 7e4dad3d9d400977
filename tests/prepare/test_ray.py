"""The same stages on a Ray cluster of two workers: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftree.config.prepare import parse_settings
from preftree.errors import SettingsError
from tests.support.prepare import command, contents, flags, rows, write


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own, of many kinds
def test_two_workers_make_the_same_files(inputs: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'preftree[ray]'")
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        write(source / f"{number}.jsonl", rows(40, seed=number))
    options = {"dataset_name": source, "num_rejected": 2, "num_samples": 30}
    command(*flags(inputs, tmp_path / "alone", **options))
    try:
        said = command(*flags(inputs, tmp_path / "cluster", **options, ray="local", ray_workers=2))
    finally:
        ray.shutdown()
    assert "selected 30 rows" in said
    alone, cluster = contents(tmp_path / "alone"), contents(tmp_path / "cluster")
    # The journal's lines come in the order in which the actors are done.
    journal = ".prepare/answers.jsonl"
    assert sorted(alone.pop(journal).splitlines()) == sorted(cluster.pop(journal).splitlines())
    assert cluster == alone


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftree.config.prepare.importlib.util.find_spec", lambda name: None)
    base = ["--dataset_name", "D", "--output_dir", "O", "--model_name_or_path", "M"]
    with pytest.raises(SettingsError, match=r"preftree\[ray\]"):
        parse_settings([*base, "--ray", "local"])
    with pytest.raises(SettingsError, match="vllm is not installed"):
        parse_settings([*base, "--engine", "vllm"])
