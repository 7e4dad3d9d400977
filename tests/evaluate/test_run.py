"""The commands on a tiny model and the samples: results, comparison, refusals, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner

from preftree.cli import app
from preftree.errors import DataError, DeviceError, ModelError, RunError, SettingsError
from preftree.evaluate import compare
from preftree.evaluate.results import find_results
from preftree.evaluate.tasks import plan_tasks
from tests.support import tiny

TASKS = "arc_challenge,truthfulqa_mc2,mmlu"


def test_results_are_lm_evals(evaluated: Callable[..., Path], models: Path, samples: Path, tmp_path: Path) -> None:
    found = find_results(str(evaluated("base", tasks=TASKS)))
    (tmp_path / "plan").mkdir()
    manager = plan_tasks(TASKS.split(","), tmp_path / "plan", str(samples / "eval"), num_fewshot=1)
    theirs = HFLM(pretrained=str(models / "base"), dtype="float32", device="cpu", batch_size=4)
    expected = simple_evaluate(theirs, tasks=TASKS.split(","), limit=2, task_manager=manager)
    assert found.results["results"].keys() == expected["results"].keys()
    for task, scores in expected["results"].items():
        for metric, value in scores.items():
            if isinstance(value, float):
                assert found.results["results"][task][metric] == pytest.approx(value, abs=1e-4), (task, metric)
    for task, rows in expected["samples"].items():
        for ours, row in zip(found.samples[task], rows, strict=True):
            assert ours["prompt_hash"] == row["prompt_hash"]
            assert [r[0][1] in (True, "True") for r in ours["resps"]] == [r[0][1] for r in row["resps"]]
    for name, scores_ in found.scores.items():
        assert scores_.mean == pytest.approx(expected["results"][name][f"{scores_.metric},none"], abs=1e-6)
        if name != "mmlu":  # lm-eval pools the subjects' errors
            assert scores_.stderr == pytest.approx(expected["results"][name][f"{scores_.metric}_stderr,none"], rel=1e-3)


def test_a_model_beside_its_base(evaluated: Callable[..., Path], models: Path, tmp_path: Path) -> None:
    base, tuned = evaluated("base", tasks=TASKS), evaluated("tuned", tasks=TASKS, adapter=str(models / "adapter"))
    compare.run([str(base), str(tuned)], str(tmp_path / "table"))
    text = (tmp_path / "table" / "compare.md").read_text()
    assert "| Model | Average | ARC | MMLU | TruthfulQA |" in text
    content = json.loads((tmp_path / "table" / "compare.json").read_text())
    (difference,) = content["differences"]
    for task, flipped in difference["flipped"].items():
        d = difference["tasks"][task]
        assert (len(flipped["gained"]), len(flipped["lost"])) == (d["gained"], d["lost"])
        scores = [model["tasks"][task]["score"] for model in content["models"]]
        assert d["mean"] == pytest.approx(scores[1] - scores[0])
        assert d["low"] <= d["mean"] <= d["high"]
    with pytest.raises(RunError, match="exists and is not overwritten"):
        compare.run([str(base), str(tuned)], str(tmp_path / "table"))
    with pytest.raises(RunError, match="holds an evaluation already"):
        evaluated("base", tasks=TASKS)


def test_different_settings_are_not_compared(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    base = evaluated("base", tasks="arc_challenge")
    other = evaluated("other", tasks="arc_challenge", limit=1, num_fewshot=2, cache=False)
    with pytest.raises(RunError) as caught:
        compare.run([str(base), str(other)], None)
    for words in ("limit: 2 and 1", "arc_challenge, num_fewshot: 1 and 2", "questions: 2 and 1"):
        assert words in str(caught.value)
    with pytest.raises(RunError, match="no evaluation here"):
        compare.run([str(base), str(tmp_path / "nothing")], None)
    with pytest.raises(SettingsError, match="two folders"):
        compare.run([str(base)], None)


def test_held_out_pairs_beside_the_tasks(evaluated: Callable[..., Path], models: Path, samples: Path) -> None:
    rows = (samples / "pref" / "orca_pairs.jsonl").read_text().splitlines()[:12]
    pairs = models / "pairs.jsonl"
    pairs.write_text("\n".join(rows))
    folder = evaluated("out", tasks="truthfulqa_mc2", adapter=str(models / "adapter"), preferences=str(pairs), limit=10)
    report = json.loads((folder / "preferences.json").read_text())
    assert report["pairs"] > 6
    assert report["chosen_shift"] != 0
    assert report["longer"] + report["shorter"] <= report["pairs"]


def test_too_few_positions_are_told_before_anything_is_computed(evaluated: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"contexts are longer than the model's 64 positions.*--num_fewshot"):
        evaluated("out", tasks="arc_challenge", num_fewshot=10, max_length=64)
    assert find_results(str(evaluated("cut", tasks="arc_challenge", num_fewshot=10, max_length=64, truncate=True)))


def test_an_adapter_of_another_model(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    tiny.with_lora(tiny.llama(hidden_size=64)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match="does not fit"):
        evaluated("out", tasks="truthfulqa_mc2", adapter=str(tmp_path / "wide"))
    with pytest.raises(ModelError, match="no adapter"):
        evaluated("out", tasks="truthfulqa_mc2", adapter=str(tmp_path / "nothing"))


def test_what_cannot_be_had_is_told_at_once(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    """Before anything is computed: a folder that cannot be made, a device that is not here, a hub out of reach."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--out .*file is a file"):
        evaluated("file")
    with pytest.raises(RunError, match=r"--out .*cannot be made: Not a directory"):
        evaluated("file/folder")
    with pytest.raises(DeviceError, match=r"--device cdua cannot be used here: .* Here are cpu"):
        evaluated("out", tasks="truthfulqa_mc2", device="cdua")
    with pytest.raises(DataError, match=r"could not be downloaded from the hub: .*truthful_qa.* --data DIR"):
        evaluated("out", tasks="truthfulqa_mc2", data="hub")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["2 problems", "--model is missing", "--out is missing"]),
        (["--tasks", "hellaswg"], ["no local form", "Did you mean hellaswag?"]),
        (
            ["--tasks", "mmlu"],
            ["mmlu_dev.jsonl is missing", "mmlu_test.jsonl is missing", "question, subject, choices"],
        ),
        (["--tasks", "mmlu", "--limit", "0"], ["--limit must be at least 1"]),
        (["--num_fewshot", "-1"], ["--num_fewshot must be at least 0"]),
        (["--export_data", "{}/file", "--tasks", "mmlu"], ["--export-data", "cannot be made: File exists"]),
        (["--export-data", "{}", "--tasks", "mmlu"], ["cais/mmlu could not be downloaded from the hub"]),
        (["--export-data", "{}", "--tasks", "mmul"], ["mmul has no local form. Did you mean mmlu?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_command_says_what_is_wrong(
    flags: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, exit code 2, and everything that the user needs to fix it; flags are spelt either way."""
    (tmp_path / "file").write_text("")
    common = ["--model", "M", "--out", str(tmp_path / "out"), "--data", str(tmp_path)] if flags else []
    result = CliRunner().invoke(app, ["evaluate", *common, *(flag.format(tmp_path) for flag in flags)])
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert [word for word in words if word not in said] == []


@pytest.mark.long
def test_two_processes_give_the_results_of_one(
    evaluated: Callable[..., Path], models: Path, samples: Path, tmp_path: Path
) -> None:
    one = find_results(str(evaluated("one", tasks=TASKS)))
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    flags = "--limit 2 --device cpu --dtype float32 --num-fewshot 1 --no-cache"
    places = ["--model", str(models / "base"), "--out", str(tmp_path / "two"), "--data", str(samples / "eval")]
    command = f"{launch} --dynamo_backend no -m preftree evaluate --tasks {TASKS} {flags}".split()
    done = subprocess.run(
        [sys.executable, *command, *places], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = find_results(str(tmp_path / "two"))
    for name, scores in one.scores.items():
        assert two.scores[name].value_Q == pytest.approx(scores.value_Q, abs=1e-5)
    assert len(list((tmp_path / "two").glob("**/results_*.json"))) == 1


def test_the_first_line_comes_before_anything_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's import takes many seconds."""

    def stop() -> None:
        raise SettingsError("stopped before the import")

    monkeypatch.setattr("preftree.cli._need_lm_eval", stop)
    result = CliRunner().invoke(app, ["evaluate", "--model", "M", "--out", "O"])
    assert result.exit_code == 2
    assert result.output.splitlines()[0] == "evaluate   M: loading lm-eval and the model"


def test_nothing_foreign_is_printed(evaluated: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Every line is ours: no bars without a name, no warnings of lm-eval, no complaint of git."""
    evaluated("out", tasks="mmlu,truthfulqa_mc2", limit=1)
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.split()[0] not in ("precision", "scoring", "cache", "contexts")] == []
