"""From dataclasses to a command line and back: one source for flags, YAML keys and help texts.

Every flag is a dataclass field and its help text is the docstring below that field. Old names that command
lines out in the world still carry are in `OLD_FLAGS`. Each flag is parsed by itself, so that all mistakes of
a command line are reported together and not one by one.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from preftree.errors import SettingsError, did_you_mean

_RENAMED = "renamed in transformers 5"
_GONE = "gone from transformers 5 and ignored"
_SAFETENSORS = "ignored: weights are always written as safetensors"
_LOADING = "ignored: weights are always loaded that way"
_SCRATCH = "ignored: it was for models trained from scratch, which the original never did"
_GAUDI = "ignored: an optimum-habana setting without a counterpart here"
_GAUDI_ATTENTION = "ignored: attention is chosen by --attention"
_GAUDI_COMPILING = "ignored: it was about torch.compile under optimum-habana"
_GAUDI_PROFILING = "ignored: --profile says where a step's time goes"

OLD_FLAGS: dict[str, tuple[str | None, str]] = {
    "evaluation_strategy": ("eval_strategy", _RENAMED),
    "no_cuda": ("use_cpu", _RENAMED),
    "warmup_ratio": ("warmup_steps", "a value below 1 is a share of all steps"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", _RENAMED),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", _RENAMED),
    "push_to_hub_token": ("hub_token", _RENAMED),
    "push_to_hub_model_id": ("hub_model_id", _RENAMED),
    "push_to_hub_organization": (None, "ignored: write it into --hub_model_id, as ORGANIZATION/NAME"),
    "xpu_backend": ("ddp_backend", _RENAMED),
    "logging_dir": (None, "ignored: logs are in OUTPUT_DIR/run/metrics.jsonl"),
    "save_safetensors": (None, _SAFETENSORS),
    "low_cpu_mem_usage": (None, _LOADING),
    "preprocessing_num_workers": (None, "ignored: the tokenizer uses every core while texts are rendered"),
    "group_by_length": (None, "ignored: forests are filled to a token budget, so lengths need no grouping"),
    "padding_side": (None, "ignored: forests hold no padding"),
    "dispatch_batches": (None, "gone from transformers 5 and ignored; see --accelerator_config"),
    "split_batches": (None, "gone from transformers 5 and ignored; see --accelerator_config"),
    "include_tokens_per_second": (None, "ignored: tokens per second are always logged"),
    "include_inputs_for_metrics": (None, _GONE),
    "fp16_backend": (None, _GONE),
    "fp16_opt_level": (None, _GONE),
    "half_precision_backend": (None, _GONE),
    "jit_mode_eval": (None, _GONE),
    "fsdp_min_num_params": (None, "ignored: see --fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": (None, "ignored: see transformer_layer_cls_to_wrap in --fsdp_config"),
    "mp_parameters": (None, _GONE),
    "past_index": (None, _GONE),
    "ray_scope": (None, _GONE),
    "torchdynamo": (None, "gone from transformers 5 and ignored; see --torch_compile"),
    "tpu_metrics_debug": (None, _GONE),
    "tpu_num_cores": (None, _GONE),
    "use_ipex": (None, "ignored: what it did is in torch itself by now"),
    "use_legacy_prediction_loop": (None, _GONE),
    "use_mps_device": (None, "ignored: an Apple GPU is chosen by itself; --use_cpu keeps off it"),
    "model_type": (None, _SCRATCH),
    "config_name": (None, _SCRATCH),
    "config_overrides": (None, _SCRATCH),
    "use_hpu_graphs": (None, _GAUDI),
    "use_hpu_graphs_for_inference": (None, _GAUDI),
    "disable_tensor_cache_hpu_graphs": (None, _GAUDI),
    "max_hpu_graphs": (None, _GAUDI),
    "distribution_strategy": (None, _GAUDI),
    "throughput_warmup_steps": (None, _GAUDI),
    "adjust_throughput": (None, _GAUDI),
    "pipelining_fwd_bwd": (None, _GAUDI),
    "non_blocking_data_copy": (None, _GAUDI),
    "ignore_eos": (None, _GAUDI),
    "minimize_memory": (None, _GAUDI),
    "use_zero3_leaf_promotion": (None, _GAUDI),
    "attn_implementation": (None, _GAUDI_ATTENTION),
    "flash_attention_causal_mask": (None, _GAUDI_ATTENTION),
    "flash_attention_fast_softmax": (None, _GAUDI_ATTENTION),
    "flash_attention_recompute": (None, _GAUDI_ATTENTION),
    "sdp_on_bf16": (None, _GAUDI_ATTENTION),
    "allow_unspec_int_on_nn_module": (None, _GAUDI_COMPILING),
    "cache_size_limit": (None, _GAUDI_COMPILING),
    "compile_dynamic": (None, _GAUDI_COMPILING),
    "compile_from_sec_iteration": (None, _GAUDI_COMPILING),
    "inline_inbuilt_nn_modules": (None, _GAUDI_COMPILING),
    "use_compiled_autograd": (None, _GAUDI_COMPILING),
    "use_regional_compilation": (None, _GAUDI_COMPILING),
    "profiling_record_shapes": (None, _GAUDI_PROFILING),
    "profiling_steps": (None, _GAUDI_PROFILING),
    "profiling_steps_eval": (None, _GAUDI_PROFILING),
    "profiling_warmup_steps": (None, _GAUDI_PROFILING),
    "profiling_warmup_steps_eval": (None, _GAUDI_PROFILING),
    "profiling_with_stack": (None, _GAUDI_PROFILING),
}
"""Flags of older versions and of the original script: what each is called now (None: nothing), and a word."""


@dataclasses.dataclass
class Parsed:
    """What a command line says: `values` by field name, `notes` to print, `problems` to refuse it for."""

    values: dict[str, Any]
    notes: list[str]
    problems: list[str]


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field that `cls` itself declares (not its bases), as one line each."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


class _FlagError(Exception):
    """One flag with a value that its type refuses."""


class FlagParser(HfArgumentParser):
    """HfArgumentParser with docstrings for help texts, no abbreviations, and errors that can be collected."""

    def __init__(
        self,
        groups: Iterable[type],
        prog: str = "preftree train",
        description: str = "DPO training over token trees.",
        old_flags: Mapping[str, tuple[str | None, str]] = OLD_FLAGS,
    ) -> None:
        self._old_flags = old_flags
        groups = list(groups)
        for cls in groups:
            _docs_to_help(cls)
        super().__init__(
            groups,  # type: ignore[arg-type]
            prog=prog,
            allow_abbrev=False,
            usage=f"{prog} [settings.yaml] [--flag value ...]",
            description=f"{description} The YAML file has the same names; flags win over it.",
        )
        for action in self._actions:
            if action.type is string_to_bool:  # HfArgumentParser lets those without a default not stand alone
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        raise _FlagError(message)

    @property
    def flags(self) -> set[str]:
        """Every flag, without dashes and in its underscore spelling."""
        return {option[2:].replace("-", "_") for option in self._option_string_actions if option[:2] == "--"}

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Read `[settings.yaml] --flag value …`; nothing is raised, all problems come back."""
        parsed = Parsed({}, [], [])
        groups: list[tuple[str, list[str], str]] = []
        words = list(argv)
        if words and words[0].endswith((".yaml", ".yml")):
            path = words.pop(0)
            for key, value in _read_yaml(Path(path), parsed.problems).items():
                groups.append((key.replace("-", "_"), _as_words(value), f"{path}: {key}"))
        groups += _split(words, parsed.problems)
        namespace = argparse.Namespace()
        self._parse_one(["--"], namespace)  # so that every default is there
        for name, group_values, shown in groups:
            self._take(name, group_values, shown, namespace, parsed)
        parsed.values = vars(namespace)
        return parsed

    def _take(self, name: str, words: list[str], shown: str, namespace: argparse.Namespace, parsed: Parsed) -> None:
        """Parse one flag into `namespace`, or add what is wrong with it to `parsed.problems`."""
        if name in self._old_flags and name not in self.flags:
            new, why = self._old_flags[name]
            note = f"--{name}: {why}." if new is None else f"--{name} is now --{new} ({why})."
            if note not in parsed.notes:
                parsed.notes.append(note)
            if new is None:
                return
            name = new
        if name not in self.flags:
            near = did_you_mean(name, sorted(self.flags | set(self._old_flags)))
            near = re.sub(r"(?<=[ ,])(?=\w+[,?])", "--", near)
            parsed.problems.append(f"{shown} is not a setting.{near}")
            return
        secret = name.endswith("token")  # what was given for a token is never repeated
        try:
            extra = self._parse_one([f"--{name}", *words], namespace)
        except _FlagError as error:
            text = str(error).removeprefix("argument ")
            text = re.sub(r"^--\S+: ", "", text)
            hint = "takes no such value (--use_auth_token is true or false; --token takes the token itself)"
            parsed.problems.append(f"{shown}: {hint if secret else text.rstrip('.')}.")
        else:
            if extra:
                what = "too many values" if secret else f"too many values, {' '.join(extra)!r} is left over"
                parsed.problems.append(f"{shown}: {what}.")

    def _parse_one(self, words: list[str], namespace: argparse.Namespace) -> list[str]:
        return super().parse_known_args(words, namespace)[1]


def _docs_to_help(cls: type) -> None:
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        if field.name in docs:
            text = docs[field.name].replace("%", "%%")
            field.metadata = MappingProxyType({**field.metadata, "help": text})


def _split(words: Sequence[str], problems: list[str]) -> list[tuple[str, list[str], str]]:
    """Cut a command line at its flags: (field name, values, the flag as it was written)."""
    groups: list[tuple[str, list[str], str]] = []
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            groups.append((flag[2:].replace("-", "_"), [value] if equals else [], flag))
        elif word == "-h":
            groups.append(("help", [], word))
        elif groups:
            groups[-1][1].append(word)
        else:
            problems.append(f"{word!r} belongs to no flag; the first word may be a .yaml file, all others are flags.")
    return groups


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an unreadable one is a problem and reads as empty."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.")
        return {}
    except yaml.YAMLError as error:
        problems.append(f"{path} is not YAML: {' '.join(str(error).split())}")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path} must hold 'flag: value' lines. Got a {type(content).__name__} instead.")
        return {}
    return {str(key): value for key, value in content.items() if value is not None}


def _as_words(value: Any) -> list[str]:
    """A YAML value as it would be written on a command line."""
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value)] if isinstance(value, dict) else [str(value)]


def filled(groups: Iterable[Any], parsed: Parsed) -> list[Any]:
    """Each group of settings (a dataclass) with its values; what it refuses is added to `parsed.problems`."""
    made = []
    for group in groups:
        try:
            made.append(
                group(**{item.name: parsed.values[item.name] for item in dataclasses.fields(group) if item.init})
            )
        except SettingsError as error:
            parsed.problems += error.problems
    return made


def one_of(problems: list[str], name: str, value: str, allowed: Collection[str]) -> None:
    """Add a problem unless `value` is one of `allowed`."""
    if value not in allowed:
        near = did_you_mean(str(value), allowed, limit=1)
        problems.append(f"--{name} must be one of {', '.join(allowed)}. Got {value!r} instead.{near}")


def within(
    problems: list[str],
    name: str,
    value: float | None,
    low: float,
    high: float = float("inf"),
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Add a problem unless low ≤ value ≤ high (`above`, `below`: strictly); None is always fine."""
    if value is None:
        return
    fits_low = value > low if above else value >= low
    fits_high = value < high if below else value <= high
    if not (fits_low and fits_high):  # written so that NaN does not fit
        text = f"above {low:g}" if above else f"at least {low:g}"
        if high != float("inf"):
            text += f" and {'below' if below else 'at most'} {high:g}"
        problems.append(f"--{name} must be {text}. Got {value} instead.")


def refuse(problems: Sequence[str]) -> None:
    """Raise SettingsError with all `problems`, if there are any."""
    if problems:
        raise SettingsError(*problems)
