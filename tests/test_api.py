"""The public names: what is exported, that importing it costs nothing, and that the documented examples run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import preftree
from tests.support import tiny
from tests.support.command import TEMPLATE, write_inputs
from tests.support.prepare import rows

ROOT = Path(__file__).parents[1]
#: What takes seconds to import.
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "accelerate")


def test_import_is_light() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, preftree; dir(preftree); print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


def test_every_export_is_there() -> None:
    for name in preftree.__all__:
        assert getattr(preftree, name) is not None
    assert {"DPOTrainer", "DPOConfig", "check", "prepare", "evaluate", "compare", "load_pairs"} <= set(dir(preftree))
    assert all(callable(getattr(preftree, name)) for name in preftree.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="has no attribute 'SFTTrainer'"):
        _ = preftree.SFTTrainer  # type: ignore[attr-defined]


def test_a_stage_is_a_package_and_a_function() -> None:
    from preftree import check
    from preftree.check.report import Report

    report = check(str(ROOT / "tests/samples/pref/orca_pairs.jsonl"), max_rows=5)
    assert isinstance(report, Report)
    assert report.rows == 5


def test_every_export_is_in_a_documented_example() -> None:
    examples = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.S))
    imported = {
        name.strip() for names in re.findall(r"from preftree import (.*)", examples) for name in names.split(",")
    }
    assert set(preftree.__all__) - {"__version__"} <= imported


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_documented_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of docs/api.md, one after another, on a tiny model in a folder called smollm2."""
    write_inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tiny.llama(num_hidden_layers=2, max_position_embeddings=4096).save_pretrained(tmp_path / "smollm2")
    tiny.word_tokenizer(TEMPLATE).save_pretrained(tmp_path / "smollm2")
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    shutil.copytree(ROOT / "tests/samples/eval", tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 7
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), {})
    assert (tmp_path / "run1" / "adapter_model.safetensors").is_file()
    assert "{0: -" in capsys.readouterr().out


def test_the_table_of_fields_is_generated_from_the_code() -> None:
    pytest.importorskip("trl", reason="TRL is not installed (the test extra has it)")
    sys.path.insert(0, str(ROOT / "scripts"))
    import trl_table

    page = trl_table.FILE.read_text(encoding="utf-8")
    assert trl_table.with_table(page) == page, "run `python scripts/trl_table.py --write`"


def test_losses_are_documented() -> None:
    from preftree.train.losses import LOSSES

    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert [name for name in LOSSES if f"| `{name}` |" not in page] == []


def test_a_loss_of_ones_own_is_one_function_and_one_line(tmp_path: Path) -> None:
    """The example of docs/losses.md, then a configuration that asks for it."""
    from preftree.train.losses import LOSSES

    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    try:
        exec(compile(example, "docs/losses.md", "exec"), {})
        assert preftree.DPOConfig(str(tmp_path), loss_type="squared", use_cpu=True).loss_type == ["squared"]
    finally:
        LOSSES.pop("squared", None)
