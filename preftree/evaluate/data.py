"""The four benchmarks of the leaderboard from local files, for lm-eval's own tasks.

    DIR/arc_challenge_{train,test}.jsonl      question, choices {text, label}, answerKey
    DIR/hellaswag_{train,validation}.jsonl    activity_label, ctx_a, ctx_b, endings, label
    DIR/mmlu_{dev,test}.jsonl                 question, subject, choices, answer
    DIR/truthfulqa_mc.jsonl                   question, mc1_targets, mc2_targets

Only where the rows come from is changed. Prompts, few-shot sampling and metrics stay lm-eval's: a task's own YAML
is included, and `local_splits` stands in for its download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from preftree.errors import DataError, SettingsError, did_you_mean
from preftree.io.run_folder import make_folder

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One benchmark: its files by split, its fields, and where the hub has it."""

    files: dict[str, str]
    fields: tuple[str, ...]
    hub: tuple[str, str | None]


_TRUTHFULQA = Source(
    {"validation": "truthfulqa_mc.jsonl"},
    ("question", "mc1_targets", "mc2_targets"),
    ("truthfulqa/truthful_qa", "multiple_choice"),
)
SOURCES: dict[str, Source] = {
    "arc_challenge": Source(
        {"train": "arc_challenge_train.jsonl", "test": "arc_challenge_test.jsonl"},
        ("question", "choices", "answerKey"),
        ("allenai/ai2_arc", "ARC-Challenge"),
    ),
    "hellaswag": Source(
        {"train": "hellaswag_train.jsonl", "validation": "hellaswag_validation.jsonl"},
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        ("Rowan/hellaswag", None),
    ),
    "mmlu": Source(
        {"dev": "mmlu_dev.jsonl", "test": "mmlu_test.jsonl"},
        ("question", "subject", "choices", "answer"),
        ("cais/mmlu", "all"),
    ),
    "truthfulqa_mc1": _TRUTHFULQA,
    "truthfulqa_mc2": _TRUTHFULQA,
}

_KINDS: dict[str, Callable[[Any], bool]] = {
    "choices": lambda v: _texts(v) or (isinstance(v, dict) and _texts(v.get("text")) and _texts(v.get("label"))),
    "endings": lambda v: _texts(v),
    "answer": lambda v: isinstance(v, int),
    "label": lambda v: str(v).isdigit(),
    "mc1_targets": lambda v: _targets(v),
    "mc2_targets": lambda v: _targets(v),
}


def local_splits(folder: str, source: str, subject: str | None = None, **_: Any) -> DatasetDict:
    """What lm-eval calls in place of a download (`custom_dataset`): a splits, of one MMLU subject if given."""
    splits = read_source(folder, source)
    return DatasetDict(
        {
            split: Dataset.from_list([row for row in rows if subject is None or row["subject"] == subject])
            for split, rows in splits.items()
        }
    )


def subjects(folder: str) -> list[str]:
    """The MMLU subjects that have questions in DIR."""
    return sorted({row["subject"] for row in read_source(folder, "mmlu")["test"]})


@lru_cache(maxsize=8)
def read_source(folder: str, name: str) -> dict[str, list[Row]]:
    """A benchmark's rows by split, with the fields of its schema only.

    Raises:
        DataError: files that are missing, rows without a field; all of them at once.
    """
    source, problems, splits = SOURCES[name], [], {}
    for split, file in source.files.items():
        path = Path(folder) / file
        if not path.is_file():
            problems.append(
                f"--data {folder}: {file} is missing ({name} needs it, one JSON object a line with "
                f"{', '.join(source.fields)}); preftree evaluate --export-data {folder} makes it from the hub"
            )
            continue
        splits[split] = list(_rows(path, source, problems))
        if not splits[split] and not problems:
            problems.append(f"{path} has no rows")
    if problems:
        raise DataError(*problems)
    return splits


def _rows(path: Path, source: Source, problems: list[str]) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            problems.append(f"{path}, line {number}: no JSON ({problem})")
            continue
        wrong = [
            field
            for field in source.fields
            if not isinstance(row, dict)
            or field not in row
            or not _KINDS.get(field, lambda v: isinstance(v, str))(row[field])
        ]
        if wrong:
            problems.append(f"{path}, line {number}: {', '.join(wrong)} missing or of another form")
        else:
            yield {field: row[field] for field in source.fields}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def _targets(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _texts(value.get("choices"))
        and len(value.get("labels") or ()) == len(value["choices"])
    )


def export(folder: str, tasks: str) -> None:
    """`preftree evaluate --export-data`: the local files of the tasks asked for."""
    names = [
        name.strip() for name in tasks.replace("openllm", "arc_challenge,hellaswag,mmlu,truthfulqa_mc2").split(",")
    ]
    if unknown := [name for name in names if name not in SOURCES]:
        raise SettingsError(
            *(
                f"--export-data: {n} has no local form.{did_you_mean(n, SOURCES)} Give some of {', '.join(SOURCES)}"
                for n in unknown
            )
        )
    export_data(folder, names, print)


def export_data(folder: str, names: list[str], say: Callable[[str], None]) -> None:
    """Write the files of the benchmarks in `names` from the hub; files that are there are left alone.

    Raises:
        DataError: the hub cannot be reached.
        RunError: `folder` cannot be made.
    """
    place = make_folder("--export-data", folder)
    for name in dict.fromkeys(names):
        source = SOURCES[name]
        wanted = {split: file for split, file in source.files.items() if not (place / file).exists()}
        if not wanted:
            say(f"{name}: {', '.join(source.files.values())} there already")
            continue
        try:
            splits = load_dataset(source.hub[0], source.hub[1])
        except (OSError, ValueError, RuntimeError) as problem:
            first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise DataError(f"--export-data: {source.hub[0]} could not be had from the hub: {first}") from problem
        for split, file in wanted.items():
            half = place / f".{file}.writing"
            with open(half, "w", encoding="utf-8") as out:
                for row in splits[split]:
                    out.write(json.dumps({field: row[field] for field in source.fields}, ensure_ascii=False) + "\n")
            half.rename(place / file)
            say(f"{place / file}: {len(splits[split])} rows of {source.hub[0]}, {split}")
