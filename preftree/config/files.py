"""Settings from a file: YAML, or JSON such as a run folder's own config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from preftree.io.secrets import REDACTED

#: Endings of files that a command line may begin with.
ENDINGS = (".yaml", ".yml", ".json")
#: Longest settings file; whatever is longer is something else.
_MOST_BYTES = 1 << 20


def read_settings(path: Path, groups: Collection[str], problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The settings in a file, each as (name, words of a command line); mistakes are added to `problems`.

    Args:
        groups: names under which settings may be grouped, as a run folder's config.json has them.
    """
    content = _content(path, problems)
    if "fingerprint" in content and isinstance(content.get("settings"), dict):  # OUTPUT_DIR/run/config.json
        content = content["settings"]
    for name, value in content.items():
        if name in groups and isinstance(value, dict):
            pairs = value.items()
        else:
            pairs = {name: value}.items()
        for key, inner in pairs:
            if inner is not None and inner != REDACTED and inner != []:
                yield str(key), _as_words(inner)


def _content(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """The mapping in a file; what is no mapping is a problem and reads as empty.

    A message never repeats what the file holds: the line with a mistake may hold a token.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        if path.stat().st_size > _MOST_BYTES:
            raise OSError("it is too large for a file of settings")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError:
        problems.append(f"{path} cannot be read: it is not UTF-8 text.")
        return {}
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror or error}.")
        return {}
    except RecursionError:
        problems.append(f"{path} is nested too deeply. Write one 'flag: value' line per setting.")
        return {}
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{path} is not {'JSON' if path.suffix == '.json' else 'YAML'}: {_where(error)}.")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path} must hold 'flag: value' lines. Got a {type(content).__name__} instead.")
        return {}
    return content


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    mark = getattr(error, "problem_mark", None)
    reason = re.sub(r"(['\"]).*\1", "…", str(getattr(error, "problem", None) or "a mistake"), flags=re.DOTALL)
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}" if mark else reason


def _as_words(value: Any) -> list[str]:
    """A value as it would be written on a command line."""
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list):
        return [word for item in value for word in _as_words(item)]
    return [json.dumps(value)] if isinstance(value, dict) else [str(value)]
