"""The fields of transformers' TrainingArguments, read from its source.

Importing transformers takes seconds, which help and a mistyped flag should not cost. The class declares its fields as
literals, so the source says all there is to know: name, type, default, help and choices.
"""

from __future__ import annotations

import ast
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from preftree.config.flags import CHOSEN_LATER, Flag, Kind

#: Files of transformers that declare the enumerations of choices.
_ENUM_FILES = ("training_args.py", "trainer_utils.py", "debug_utils.py")
#: Types, as the source spells them, in the order in which a union is read; None where a flag cannot say it.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("str | list[", Kind.TEXT_OR_WORDS),
    ("list[", Kind.WORDS),
    ("dict", Kind.TEXT),
    ("str", Kind.TEXT),
    ("bool", Kind.BOOL),
    ("int", Kind.INT),
    ("float", Kind.FLOAT),
)


@functools.cache
def trainer_flags() -> dict[str, Flag]:
    """Every field of TrainingArguments as a flag, by name, in the order of the source."""
    folder = _folder()
    body = _class(folder / "training_args.py", "TrainingArguments").body
    enums = _enums(folder)
    flags = (_flag(statement, enums) for statement in body if isinstance(statement, ast.AnnAssign))
    return {flag.name: flag for flag in flags if flag is not None}


def _folder() -> Path:
    spec = find_spec("transformers")  # of a top-level package: nothing is imported
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _class(path: Path, name: str) -> ast.ClassDef:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _enums(folder: Path) -> dict[str, tuple[str, ...]]:
    """Enumerations of strings by class name, with their values."""
    found = {}
    for file in _ENUM_FILES:
        for node in ast.parse((folder / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                values = [each.value for each in node.body if isinstance(each, ast.Assign)]
                found[node.name] = tuple(str(value.value) for value in values if isinstance(value, ast.Constant))
    return found


def _flag(statement: ast.AnnAssign, enums: dict[str, tuple[str, ...]]) -> Flag | None:
    annotation = ast.unparse(statement.annotation)
    kind = next((kind for name, kind in _KINDS if name in annotation), None)
    if kind is None or not isinstance(statement.target, ast.Name) or not isinstance(statement.value, ast.Call):
        return None
    parts = {word.arg: word.value for word in statement.value.keywords if word.arg}
    metadata = _metadata(parts.get("metadata"))
    named = next((enums[name] for name in annotation.replace("|", " ").split() if name in enums), None)
    choices = metadata.get("choices") or (named if kind is Kind.TEXT else None)
    if kind is Kind.TEXT and metadata.get("const") is True:
        kind = Kind.TEXT_OR_TRUE
    return Flag(
        name=statement.target.id,
        kind=kind,
        default=[] if "default_factory" in parts else _literal(parts.get("default"), CHOSEN_LATER),
        help=str(metadata.get("help", "")).replace("%%", "%"),
        group="transformers",
        choices=tuple(choices or ()),
    )


def _metadata(node: ast.expr | None) -> dict[str, Any]:
    """The entries of a literal dictionary that are literals themselves."""
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    return {str(key.value): _literal(value, None) for key, value in pairs if isinstance(key, ast.Constant)}


def _literal(node: ast.expr | None, otherwise: Any) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else otherwise
    except ValueError:
        return otherwise
