"""Local files through lm-eval's own tasks: the same contexts, and errors a user can act on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager

from preftree.benchmarks import BENCHMARKS, BY_TASK
from preftree.errors import DataError, SettingsError
from preftree.evaluate.data import export_data, read_splits
from preftree.evaluate.tasks import OWN_TASKS, expand, plan_tasks


def requests(task: Any, limit: int = 3) -> list[tuple[Any, ...]]:
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit)
    return [instance.args for instance in task.instances]


@pytest.fixture
def hub(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has the samples, under the names that lm-eval asks for."""

    def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        source = next(b for b in BENCHMARKS if b.hub[0] == path)
        splits = {}
        for split, file in source.files.items():
            rows = [json.loads(line) for line in (samples / "eval" / file).read_text().splitlines()]
            if "subject" in rows[0] and name != "all":
                rows = [row for row in rows if row["subject"] == name]
            splits[split] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("preftree.evaluate.data.load_dataset", load_dataset)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["arc_challenge", "hellaswag", "mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2"])
def test_contexts_are_those_of_lm_evals_own_task(name: str, samples: Path, tmp_path: Path) -> None:
    asked = "mmlu" if name.startswith("mmlu") else name
    local = plan_tasks([asked], tmp_path, str(samples / "eval")).load([name])["tasks"][name]
    folder = {"mmlu_anatomy": "mmlu/default"}.get(name, name.partition("_")[0])
    theirs = TaskManager(include_path=str(OWN_TASKS / folder), include_defaults=False).load([name])["tasks"][name]
    shots = BY_TASK[asked].shots
    assert local.config.num_fewshot == shots
    theirs.set_config("num_fewshot", shots)
    found = requests(local)
    assert found == requests(theirs)
    assert len(found) > 8
    assert local.config.metric_list == theirs.config.metric_list


def test_mmlu_is_the_subjects_that_are_there(samples: Path, tmp_path: Path) -> None:
    loaded = plan_tasks(["mmlu"], tmp_path, str(samples / "eval"), num_fewshot=2).load(["mmlu"])
    assert list(loaded["groups"]) == ["mmlu"]
    assert len(loaded["tasks"]) == 4
    assert {task.config.num_fewshot for task in loaded["tasks"].values()} == {2}


@pytest.mark.usefixtures("hub")
def test_exported_files_are_read_back(samples: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "truthfulqa_mc.jsonl").write_text("mine")
    names = ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]
    export_data(str(tmp_path), names, said.append)
    for name in names[:3]:
        assert read_splits(str(tmp_path), name) == read_splits(str(samples / "eval"), name)
    assert (tmp_path / "truthfulqa_mc.jsonl").read_text() == "mine"
    assert "there already" in said[-1]


def test_suites_and_names() -> None:
    assert expand("openllm") == ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]
    assert expand("mmlu, openllm,gsm8k")[:2] == ["mmlu", "arc_challenge"]
    assert expand("mmlu, openllm,gsm8k")[-1] == "gsm8k"
    with pytest.raises(SettingsError, match="--tasks is empty"):
        expand(" ,")


def test_missing_and_broken_files_are_named(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hellaswag_train.jsonl is missing .*activity_label, ctx_a") as caught:
        plan_tasks(["hellaswag"], tmp_path, str(tmp_path / "nowhere"))
    assert len(caught.value.problems) == 2
    place = tmp_path / "data"
    shutil.copytree(samples / "eval", place)
    file = place / "truthfulqa_mc.jsonl"
    file.chmod(0o644)
    rows = file.read_text().splitlines()
    broken = json.loads(rows[1]) | {"mc2_targets": {"choices": ["a"], "labels": []}}
    file.write_text("\n".join([rows[0], json.dumps(broken), "{", *rows[2:]]))
    with pytest.raises(DataError) as caught:
        plan_tasks(["truthfulqa_mc2"], tmp_path, str(place))
    assert [problem.partition(": ")[2][:30] for problem in caught.value.problems] == [
        "mc2_targets missing or of anot",
        "not JSON (Expecting property n",
    ]


def test_tasks_without_a_local_form_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--tasks hellaswg: there is no local form.*Did you mean hellaswag"):
        plan_tasks(["hellaswg"], tmp_path, str(tmp_path))


def test_unknown_tasks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = TaskManager(include_path=str(OWN_TASKS / "arc"), include_defaults=False)  # not all ten thousand
    monkeypatch.setattr("preftree.evaluate.tasks.TaskManager", lambda **_: few)
    with pytest.raises(SettingsError, match=r"--tasks arc_esay: lm-eval has no such task. Did you mean arc_easy"):
        plan_tasks(["arc_esay"], tmp_path, "hub")


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("arc_challenge", {"answerKey": "Z"}, "answerKey 'Z' is none of the labels 'A', 'B'"),
        ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "1 labels for 2 choices"),
        ("mmlu", {"answer": 4}, "answer is 4, and choices has 4, numbered from 0"),
        ("mmlu", {"answer": -1}, "answer is -1"),
        ("hellaswag", {"label": "7"}, "label is 7, and endings has 4"),
        ("truthfulqa_mc1", {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}}, "with the first true"),
        ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [0, 0]}}, "with one true"),
        ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [1, "x"]}}, "labels must be 1"),
    ],
)
def test_a_right_answer_that_is_no_option_is_refused(
    task: str, change: dict[str, Any], said: str, samples: Path, tmp_path: Path
) -> None:
    """lm-eval would end in a traceback, or count every answer as wrong."""
    place = tmp_path / "data"
    place.mkdir()
    benchmark = BY_TASK[task]
    for split, name in benchmark.files.items():
        rows = [json.loads(line) for line in (samples / "eval" / name).read_text().splitlines()[:2]]
        if split == benchmark.tested:
            rows[1] |= change
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="line 2: ") as caught:
        read_splits(str(place), task)
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]
