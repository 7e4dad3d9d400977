"""The original's command lines on Gaudi, read by the argument class that it used (optimum-habana 1.21.2, in an
environment of its own) and by ours: every flag is known, and means the same."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from preftree.config.legacy import OLD_FLAGS
from preftree.config.parser import FlagParser, Parsed
from preftree.config.train import parser

pytestmark = pytest.mark.gaudi_oracle

#: Flags that are refused as unknown: each would change what is computed, and there is nothing here that does it.
REFUSED = {"adafactor", "context_parallel_size", "flash_attention_fp8", "fp8"}
#: Defaults that are not the original's, and why.
OTHER_DEFAULTS = {
    "adam_epsilon": "1e-8 as on every other device; Gaudi's class had 1e-6",
    "ddp_bucket_cap_mb": "DistributedDataParallel is not used",
    "ddp_find_unused_parameters": "DistributedDataParallel is not used",
    "disable_tqdm": "a live line of our own",
    "fsdp": "an empty value by another name",
    "gradient_checkpointing": "an empty value by another name; recomputed where memory asks for it",
    "logging_nan_inf_filter": "transformers' own default",
    "logging_steps": "10 and not 500",
    "lr_scheduler_kwargs": "an empty value by another name",
    "optim": "transformers' own default; on Gaudi both are its FusedAdamW",
    "remove_unused_columns": "batches are forests",
    "report_to": "no trackers unless asked for",
    "torch_dtype": "auto says what is fast; the original had float16",
    "use_lazy_mode": "eager mode unless asked for",
}
VALUES = """
    --learning_rate 5e-4|--learning_rate 1|--max_steps -1|--max_steps 1000 --max_steps 7|--save_steps 10
    --save_steps 0.5|--logging_steps 10|--eval_steps 0.25|--num_train_epochs 3|--num_train_epochs 0.5|--warmup_steps 100
    --lr_scheduler_type cosine|--lr_scheduler_type=linear|--optim adamw_torch|--save_strategy no|--eval_strategy epoch
    --report_to none|--output-dir P|--output_dir A --output_dir B|--save_total_limit 3|--lr_scheduler_kwargs '{"a":1}'
    --lora_target_modules k_proj q_proj v_proj|--lora_target_modules 'k_proj' "q_proj"|--lora_target_modules k,q
    --label_names a b|--torch_dtype bfloat16|--gaudi_config_name Habana/gpt2|--beta .5|--lora_dropout 0
    --ddp_backend gloo|--ddp_timeout 60|--validation_split_percentage 5|--preprocessing_num_workers 4|--seed=7
    --learning_rate soon|--max_steps 1.5|--lr_scheduler_type cosin|--lora_rank|--lora_rank 1 2|--learning_rate
    --lr_scheduler_typ linear|--lora 3|--validation_split_percentage 2.5
"""
#: Lines that only we take: a share of pairs need not be whole.
ONLY_OURS = {"--validation_split_percentage 2.5"}


def ours() -> FlagParser:
    return parser()


@cache
def original(*lines: str) -> dict[str, Any]:
    """What the original's parser makes of command lines."""
    python = os.environ.get("GAUDI_ORACLE_PYTHON")
    if python is None:
        pytest.skip("optimum-habana's environment is not here: make test-gaudi-oracle")
    script = Path(__file__).with_name("gaudi_flags.py")
    words = json.dumps([shlex.split(line) for line in lines])
    done = subprocess.run([python, str(script)], input=words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """As JSON has it; an enumeration's member is its value."""
    return json.loads(json.dumps(value, default=lambda value: getattr(value, "value", str(value))))


def named(line: str) -> list[str]:
    """The flags of a line, by field name."""
    words = [word.partition("=")[0] for word in shlex.split(line) if word.startswith("--")]
    return [word[2:].replace("-", "_") for word in words]


def assert_same(line: str, expected: dict[str, Any], found: Parsed) -> None:
    """Refused by both, or every flag of the line has the same value."""
    assert ("error" in expected) == bool(found.problems), (line, expected.get("error"), found.problems)
    for name in [] if found.problems else named(line):
        field = name if name in found.values else name.removeprefix("no_")
        assert plain(found.values[field]) == expected[field], line


def test_every_flag_is_known() -> None:
    flags = set(original()["flags"])
    assert len(flags) > 150
    assert flags - ours().flags - set(OLD_FLAGS) == REFUSED


def test_defaults_are_the_same_or_known_to_differ() -> None:
    theirs = original()["flags"]
    values = ours().parse([]).values
    differ = {name for name in theirs if name in values and plain(values[name]) != theirs[name]}
    assert differ == set(OTHER_DEFAULTS)


def test_booleans_in_every_spelling() -> None:
    theirs = original()["flags"]
    values = ours().parse([]).values
    booleans = sorted(name for name in theirs if name in values and isinstance(theirs[name], bool))
    assert len(booleans) > 30
    spellings = ("", " true", " false", "=True", "=0", " yes", " n", " maybe", " true false")
    lines = [f"--{name}{spelling}" for name in booleans for spelling in spellings]
    lines += [f"--no_{name}" for name in booleans if theirs[name] and values[name]]
    lines += [f"--{name.replace('_', '-')} true" for name in booleans]
    for line, expected in zip(lines, original(*lines)["parsed"], strict=True):
        assert_same(line, expected, ours().parse(shlex.split(line)))


def test_values_and_mistakes() -> None:
    lines = [line.strip() for row in VALUES.strip().splitlines() for line in row.split("|")]
    for line, expected in zip(lines, original(*lines)["parsed"], strict=True):
        if line in ONLY_OURS:
            assert "error" in expected
            assert not ours().parse(shlex.split(line)).problems
        else:
            assert_same(line, expected, ours().parse(shlex.split(line)))


def test_the_recipes(repo_root: Path) -> None:
    """As runs/ has them, which are the original's."""
    lines = []
    for name in ("cpu", "cuda", "gaudi"):
        text = (repo_root / "runs" / f"{name}.sh").read_text()
        lines.append(
            text[text.index("dpo_clm.py --") :].removeprefix("dpo_clm.py").replace("\\\n", " ").replace('"$@"', "")
        )
    for line, expected in zip(lines, original(*lines)["parsed"], strict=True):
        assert "error" not in expected
        assert_same(line, expected, ours().parse(shlex.split(line)))
