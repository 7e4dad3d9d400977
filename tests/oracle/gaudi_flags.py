"""Run by the Python of `make test-gaudi-oracle`: parses command lines as optimum-habana itself does.

Reads a JSON list of command lines from standard input; writes {"flags": {flag: default}, "parsed": [{flag: value}]},
with {"error": message} for a line that is refused. Shares no module with preftree, whose libraries are of another age.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

_run = subprocess.run


def _without_a_card(command: Any, *args: Any, **others: Any) -> Any:
    # On import it asks pip for the version of Gaudi's plugin and fails where there is none.
    if "habana-torch-plugin" in command:
        return subprocess.CompletedProcess(command, 0, "habana-torch-plugin 1.24.0\n", "")
    return _run(command, *args, **others)


subprocess.run = _without_a_card  # type: ignore[assignment]

from optimum.habana.transformers.training_args import GaudiTrainingArguments  # noqa: E402
from transformers import HfArgumentParser  # noqa: E402


@dataclass
class ScriptArguments:
    """The flags that the original dpo_clm.py had beside those of the library: names, types, defaults."""

    model_name_or_path: str | None = None
    model_type: str | None = None
    config_overrides: str | None = None
    config_name: str | None = None
    tokenizer_name: str | None = None
    cache_dir: str | None = None
    use_fast_tokenizer: bool = True
    model_revision: str = "main"
    use_auth_token: bool = False
    torch_dtype: str | None = field(default="float16", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    streaming: bool = False
    overwrite_cache: bool = False
    validation_split_percentage: int | None = 2
    preprocessing_num_workers: int | None = None
    max_prompt_length: int = 512
    max_length: int = 1024
    pad_max: bool = False
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: None)  # type: ignore[arg-type,return-value]
    lora_all_linear: bool = True
    beta: float = 0.1


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _plain(values: argparse.Namespace) -> dict[str, Any]:
    """Values as JSON has them; an enumeration's member is its value."""
    text = json.dumps(vars(values), default=lambda value: getattr(value, "value", str(value)))
    return json.loads(text)  # type: ignore[no-any-return]


def _parse(parser: _Parser, words: list[str]) -> dict[str, Any]:
    try:
        return _plain(parser.parse_args(words))
    except (ValueError, argparse.ArgumentTypeError) as error:
        return {"error": str(error)}


def main() -> None:
    parser = _Parser((ScriptArguments, GaudiTrainingArguments), allow_abbrev=False)
    lines = json.load(sys.stdin)
    found = {"flags": _plain(parser.parse_args([])), "parsed": [_parse(parser, words) for words in lines]}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
