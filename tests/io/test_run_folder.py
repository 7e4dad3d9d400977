"""An output folder belongs to one run, and what is in it is whole at every moment."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from preftree.errors import RunError
from preftree.io.run_folder import RunFolder


def claim(path: Path, *, data: str = "12 pairs", fingerprint: str = "f", **how: bool) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(
        resume=how.get("resume", False),
        overwrite=how.get("overwrite", False),
        fingerprint=fingerprint,
        config={"train": {"beta": fingerprint, "output_dir": str(path)}},
        identity={"training pairs": data},
    )
    return folder


def used(path: Path) -> RunFolder:
    folder = claim(path)
    folder.log({"step": 1})
    (path / "checkpoint-10").mkdir()
    (path / "adapter_model.safetensors").touch()
    return folder


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    folder = claim(tmp_path / "a" / "b")
    folder.write_env({"cores": 2})
    assert json.loads(folder.config_path.read_text()) == {
        "fingerprint": "f",
        "settings": {"train": {"beta": "f", "output_dir": str(tmp_path / "a" / "b")}},
    }
    assert json.loads(folder.env_path.read_text()) == {"cores": 2}
    assert sorted(path.name for path in folder.folder.iterdir()) == ["config.json", "env.json", "identity.json"]


def test_another_run_is_not_written_over(tmp_path: Path) -> None:
    used(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=r"(?s)another run.*--beta was f, now g.*--overwrite_output_dir"):
        claim(tmp_path, fingerprint="g")
    with pytest.raises(RunError, match=r"(?s)another run.*training pairs was 12 pairs, now 13 pairs"):
        claim(tmp_path, data="13 pairs")
    assert sorted(tmp_path.rglob("*")) == before


def test_this_very_run_goes_on(tmp_path: Path) -> None:
    folder = used(tmp_path)
    how = {"resume": False, "overwrite": False, "fingerprint": "f", "identity": {"training pairs": "12 pairs"}}
    assert folder.claim(**how) is True  # type: ignore[arg-type]
    assert (tmp_path / "checkpoint-10").exists()
    assert folder.claim(**{**how, "overwrite": True}) is False  # type: ignore[arg-type]
    assert not (tmp_path / "checkpoint-10").exists()


def test_a_run_is_finished_when_its_last_file_is_there(tmp_path: Path) -> None:
    folder = used(tmp_path)
    assert folder.finished() is None
    folder.finish(40)
    assert folder.finished() == 40
    (tmp_path / "adapter_model.safetensors").unlink()
    assert folder.finished() is None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "o")
    with folder.held():
        with pytest.raises(RunError, match="Another process is working in"), RunFolder(tmp_path / "o").held():
            pass
        folder.claim(resume=False, overwrite=True, fingerprint="f")
        folder.claim(resume=False, overwrite=True, fingerprint="g")  # deletes the run, and keeps the lock
        with pytest.raises(RunError, match="Another process is working in"), RunFolder(tmp_path / "o").held():
            pass
    with RunFolder(tmp_path / "o").held():
        pass


def test_metrics_begin_anew_from_a_checkpoint(tmp_path: Path) -> None:
    folder = used(tmp_path)
    folder.log({"step": 2})
    folder.reset_metrics([{"step": 1, "loss": math.inf}])
    folder.log({"step": 2, "loss": 0.5})
    assert list(folder.metrics()) == [{"step": 1, "loss": "inf"}, {"step": 2, "loss": 0.5}]


def test_other_files_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"other files \(thesis.tex\)"):
        claim(tmp_path)
    assert not (tmp_path / "run").exists()


def test_check_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").check(resume=False, overwrite=False, fingerprint="f")
    assert not (tmp_path / "new").exists()


def test_a_run_that_never_started_does_not_count(tmp_path: Path) -> None:
    claim(tmp_path).write_env({})
    claim(tmp_path, fingerprint="g")
    assert json.loads(RunFolder(tmp_path).config_path.read_text())["fingerprint"] == "g"


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    used(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    claim(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-best", "notes.txt", "run"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "identity.json"]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "README.md", "tokenizer.json", "checkpoint-3", "model.safetensors"]
)
def test_overwrite_never_replaces_what_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("the user's")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=rf"not of a run here \({name}\); nothing is overwritten. Give another"):
        claim(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "thesis.tex"])


def test_overwrite_keeps_files_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    claim(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    for place in (tmp_path, tmp_path / "new" / "deep"):
        with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\). Make room there, or"):
            RunFolder(place).check(resume=False, overwrite=False, fingerprint="f")
    assert list(tmp_path.iterdir()) == []


def test_resume_keeps_what_is_there(tmp_path: Path) -> None:
    folder = used(tmp_path)
    with open(folder.metrics_path, "a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a line
    assert list(folder.metrics()) == [{"step": 1}]
    claim(tmp_path, resume=True).log({"step": 2})
    assert list(folder.metrics()) == [{"step": 1}, {"step": 2}]
    assert (tmp_path / "checkpoint-10").exists()


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    used(tmp_path)
    with pytest.raises(RunError, match="--beta was f, now g"):
        claim(tmp_path, resume=True, fingerprint="g")


def test_resume_into_an_empty_folder_is_fine(tmp_path: Path) -> None:
    claim(tmp_path / "new", resume=True)


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        claim(tmp_path / "file")


def test_records_are_plain_json_and_flushed(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    folder.log({"loss": torch.tensor(0.5), "n": np.int64(3), "bad": math.nan, "worse": -math.inf, "path": tmp_path})
    folder.sample({"prompt": "früh", "answers": ("a", "b")})
    record = next(folder.metrics())
    assert record == {"loss": 0.5, "n": 3, "bad": "nan", "worse": "-inf", "path": str(tmp_path)}
    assert next(folder.samples()) == {"prompt": "früh", "answers": ["a", "b"]}
    assert folder.samples_path.read_bytes().count(b"\n") == 1


def test_json_is_replaced_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = claim(tmp_path)
    folder.write_env({"cores": 2})
    before = folder.env_path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.write_env({"cores": 3})
    assert folder.env_path.read_text() == before
    assert sorted(path.name for path in folder.folder.iterdir()) == ["config.json", "env.json", "identity.json"]
