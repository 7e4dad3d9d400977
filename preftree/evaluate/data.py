"""Local files of the test sets, for lm-eval's own tasks (`preftree.benchmarks` lists files and fields).

Only where the rows come from is changed. Prompts, few-shot sampling and metrics stay lm-eval's: a task's own YAML
is included, and `local_splits` stands in for its download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from preftree.benchmarks import BY_TASK, Benchmark, expand_tasks
from preftree.errors import DataError, SettingsError, did_you_mean
from preftree.io.atomic import atomic_file
from preftree.io.run_folder import make_folder

#: What a field must hold where that is not a string.
_FORMS: dict[str, Callable[[Any], bool]] = {
    "choices": lambda v: _texts(v) or (isinstance(v, dict) and _texts(v.get("text")) and _texts(v.get("label"))),
    "endings": lambda v: _texts(v),
    "answer": lambda v: isinstance(v, int),
    "label": lambda v: str(v).isdigit(),
    "mc1_targets": lambda v: _targets(v),
    "mc2_targets": lambda v: _targets(v),
}


def local_splits(folder: str, task: str, subject: str | None = None, **_: Any) -> DatasetDict:
    """What lm-eval calls in place of a download (`custom_dataset`): the splits, of one MMLU subject if given."""
    return DatasetDict(
        {
            split: Dataset.from_list([row for row in rows if subject is None or row["subject"] == subject])
            for split, rows in read_splits(folder, task).items()
        }
    )


def subjects(folder: str) -> list[str]:
    """The MMLU subjects that have questions in `folder`."""
    return sorted({row["subject"] for row in read_splits(folder, "mmlu")["test"]})


@lru_cache(maxsize=8)
def read_splits(folder: str, task: str) -> dict[str, list[dict[str, Any]]]:
    """The rows behind one of lm-eval's tasks by split, with the test set's fields only.

    Raises:
        DataError: files that are missing, rows without a field; all of them at once.
    """
    benchmark, problems, splits = BY_TASK[task], [], {}
    for split, file in benchmark.files.items():
        path = Path(folder) / file
        if not path.is_file():
            problems.append(
                f"--data {folder}: {file} is missing ({task} needs it, one JSON object per line with "
                f"{', '.join(benchmark.fields)}); preftree evaluate --export-data {folder} downloads it from the hub"
            )
            continue
        splits[split] = list(_rows(path, benchmark, problems))
        if not splits[split] and not problems:
            problems.append(f"{path} has no rows")
    if problems:
        raise DataError(*problems)
    return splits


def _rows(path: Path, benchmark: Benchmark, problems: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            problems.append(f"{path}, line {number}: not JSON ({problem})")
            continue
        if wrong := _wrong(row, benchmark.fields):
            problems.append(f"{path}, line {number}: {wrong}")
        else:
            yield {field: row[field] for field in benchmark.fields}


def _wrong(row: Any, fields: Sequence[str]) -> str:
    """What is wrong with a row, empty if nothing is."""
    known = row if isinstance(row, dict) else {}
    bad = [name for name in fields if name not in known or not _FORMS.get(name, _is_text)(known[name])]
    if bad:
        return f"{', '.join(bad)} missing or of another form"
    return _wrong_answer(row)


def _wrong_answer(row: dict[str, Any]) -> str:
    """What is wrong with a row's right answer: it must be one of the options."""
    if "answerKey" in row and isinstance(row["choices"], dict):
        labels = row["choices"]["label"]
        if len(labels) != len(row["choices"]["text"]):
            return f"{len(labels)} labels for {len(row['choices']['text'])} choices"
        if row["answerKey"] not in labels:
            return f"answerKey {row['answerKey']!r} is none of the labels {', '.join(map(repr, labels))}"
    for field, options in (("answer", "choices"), ("label", "endings")):
        if field in row and not 0 <= int(row[field]) < len(row[options]):
            return f"{field} is {row[field]}, and {options} has {len(row[options])}, numbered from 0"
    for field in ("mc1_targets", "mc2_targets"):
        labels = row.get(field, {}).get("labels", [1])
        # Where the right answer is first, as lm-eval takes it of mc1.
        if not set(labels) <= {0, 1} or (labels[0] != 1 if field == "mc1_targets" else 1 not in labels):
            return (
                f"{field}: labels must be 1 (true) and 0, with {'the first' if field == 'mc1_targets' else 'one'} true"
            )
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def _targets(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _texts(value.get("choices"))
        and len(value.get("labels") or ()) == len(value["choices"])
    )


def export(folder: str, asked: str) -> None:
    """`preftree evaluate --export-data`: the local files of the tasks asked for."""
    tasks = expand_tasks([name.strip() for name in asked.split(",")])
    if unknown := [task for task in tasks if task not in BY_TASK]:
        raise SettingsError(
            *(
                f"--export-data: {task} has no local form.{did_you_mean(task, BY_TASK)} "
                f"Give some of {', '.join(BY_TASK)}"
                for task in unknown
            )
        )
    export_data(folder, tasks, print)


def export_data(folder: str, tasks: Sequence[str], say: Callable[[str], None]) -> None:
    """Download the files behind `tasks` from the hub; files that exist are kept as they are.

    Raises:
        DataError: the hub cannot be reached.
        RunError: `folder` cannot be made.
    """
    place = make_folder("--export-data", folder)
    for task in tasks:
        benchmark = BY_TASK[task]
        wanted = {split: file for split, file in benchmark.files.items() if not (place / file).exists()}
        if not wanted:
            say(f"{task}: {', '.join(benchmark.files.values())} there already")
            continue
        repository, config = benchmark.hub
        try:
            splits = load_dataset(repository, config)
        except (OSError, ValueError, RuntimeError) as problem:
            first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise DataError(f"--export-data: {repository} could not be downloaded from the hub: {first}") from problem
        for split, file in wanted.items():
            with atomic_file(place / file, "w") as out:
                for row in splits[split]:
                    out.write(json.dumps({field: row[field] for field in benchmark.fields}, ensure_ascii=False) + "\n")
            say(f"{place / file}: {len(splits[split])} rows of {repository}, {split}")
