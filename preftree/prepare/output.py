"""The pairs on disk, in the columns of Intel/orca_dpo_pairs and more: where each answer came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from preftree.config.prepare import GenerateSettings
from preftree.data.fields import whole_characters
from preftree.io.atomic import atomic_file
from preftree.prepare.generate import KeptAnswer
from preftree.prepare.select import Selected

PAIR_COLUMNS = {
    "system": "system prompt; may be empty",
    "question": "what is asked",
    "chosen": "the source's answer",
    "rejected": "the weaker model's answer",
    "id": "the source's id; rows with the same id are answers to the same prompt",
    "place": "file and row of the source",
    "family": "task family, from the id",
    "teacher": "who wrote the chosen answer, where the source tells",
    "rejected_model": "who wrote the rejected answer",
    "rejected_revision": "which version of it: a commit, or a hash of the weights",
    "rejected_seed": "seed of its sampling",
    "rejected_round": "how often it was asked for before",
    "rejected_finish": "stop: it ended by itself; length: it reached max_new_tokens",
    "temperature": "of its sampling",
    "top_p": "of its sampling",
    "top_k": "of its sampling; 0: all tokens",
    "max_new_tokens": "its limit",
}
"""Column -> what it holds."""


def pairs(
    selected: Sequence[Selected], kept: Sequence[Sequence[KeptAnswer]], generate: GenerateSettings, revision: str | None
) -> Iterator[dict[str, Any]]:
    """A row for each rejected answer, in the order of the prompts."""
    for row, answers in zip(selected, kept, strict=True):
        for answer in answers:
            values = (
                row.system,
                row.question,
                row.chosen,
                answer.text,
                row.id,
                row.place,
                row.family,
                row.teacher,
                generate.model_name_or_path,
                revision,
                answer.seed,
                answer.round,
                "stop" if answer.finished else "length",
                generate.temperature,
                generate.top_p,
                generate.top_k,
                generate.max_new_tokens,
            )
            yield dict(zip(PAIR_COLUMNS, values, strict=True))


def write_pairs(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write jsonl or parquet, as the path's ending says; the file appears whole or not at all."""
    rows = ({name: whole_characters(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows)
    with atomic_file(path) as file:
        if path.suffix == ".jsonl":
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            return
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet  # type: ignore[import-untyped]

        integers = ("rejected_seed", "rejected_round", "top_k", "max_new_tokens")
        kinds = {**dict.fromkeys(integers, pa.int64()), **dict.fromkeys(("temperature", "top_p"), pa.float64())}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in PAIR_COLUMNS])
        parquet.write_table(pa.Table.from_pylist(list(rows), schema), file, compression="zstd")


def write_manifest(content: Mapping[str, Any], path: Path) -> None:
    """Write YAML, since a .json file in the folder would be read as data."""
    with atomic_file(path) as file:
        text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=110)
        file.write(text.encode())
