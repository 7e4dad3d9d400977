"""`preftree export`: merge where there is an adapter, convert, read back, and only then give the result its name."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from preftree.config.export import ExportSettings
from preftree.config.merge import MergeSettings
from preftree.data.chat import Chat
from preftree.errors import RunError
from preftree.export.converters import convert, find_converter
from preftree.export.gguf_file import check_gguf, check_gguf_weights, write_gguf
from preftree.export.ollama import write_modelfile
from preftree.export.openvino_folder import check_openvino
from preftree.io.atomic import atomic_path
from preftree.io.console import Say, next_steps, sayer
from preftree.io.progress import amount, clock
from preftree.merge.run import merge, verification_pairs
from preftree.merge.verify import Verified, check_template, expected_ends
from preftree.model.adapted import TrainedRun, find_run
from preftree.model.load import load_tokenizer, resolve, resolve_tokenizer


def run(settings: ExportSettings) -> None:
    """Export as the settings say.

    Raises:
        PreftreeError: whatever the user can fix; nothing is left of an export that fails.
    """
    console = Console(soft_wrap=True)
    say = sayer(console)
    started = time.perf_counter()
    found, target = find_run(settings.run, settings.model), Path(settings.out)
    if target.exists():
        raise RunError(f"--out {target} exists and is not overwritten. Give another name.")
    converter = _converter(settings, say)
    with _model_folder(settings, found, target, console) as model:
        say(f"export     {settings.run} to {settings.to}")
        with atomic_path(target) as place:
            passed = _EXPORTS[settings.to](settings, found, model, place, converter)
    for each in passed:
        say(f"verified   {each.name}: {each.found}")
    say(f"done       {target}: {amount(_size(target))}, in {clock(time.perf_counter() - started)}")
    next_steps(say, *_next(settings, target))


def _converter(settings: ExportSettings, say: Say) -> list[str]:
    """The converter's words; none for Ollama where there is none, which then gets safetensors."""
    if settings.to != "ollama":
        return find_converter(settings.to, settings.converter)
    try:
        return find_converter("gguf", settings.converter)
    except RunError:
        if settings.converter:
            raise
        say("           no converter to GGUF is here: Ollama gets the safetensors files, which it converts itself")
        return []


@contextmanager
def _model_folder(settings: ExportSettings, found: TrainedRun, target: Path, console: Console) -> Iterator[Path]:
    """A folder with the whole model: the run's own, or its adapter merged beside the target for as long as needed."""
    if not found.adapter:
        yield found.folder
        return
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".merged-") as place:
        merged = Path(place) / target.stem
        own = MergeSettings(settings.run, str(merged), settings.model, pairs=settings.pairs, limit=settings.limit)
        merge(own, console)
        yield merged


def _to_gguf(
    settings: ExportSettings, found: TrainedRun, model: Path, place: Path, converter: list[str]
) -> list[Verified]:
    tokenizer = load_tokenizer(resolve(str(model)))
    # Converters look at the ending of the name.
    file = place.with_name(f"{place.name}.gguf")
    try:
        write_gguf(converter, model, file, settings.gguf_type)
        pairs, _ = verification_pairs(settings.pairs, settings.limit, found, tokenizer)
        passed = check_gguf(file, Chat(tokenizer), expected_ends(model, tokenizer))
        passed.append(check_gguf_weights(file, model, pairs, settings.gguf_type))
        file.rename(place)
    finally:
        file.unlink(missing_ok=True)
    return passed


def _to_openvino(
    settings: ExportSettings, found: TrainedRun, model: Path, place: Path, converter: list[str]
) -> list[Verified]:
    task = ["export", "openvino", "--model", str(model), "--task", "text-generation-with-past", str(place)]
    convert([*converter, *task], place / "openvino_model.xml")
    if not (place / "openvino_model.bin").is_file():
        raise RunError("optimum-cli has written no openvino_model.bin")
    tokenizer = load_tokenizer(resolve(str(model)))
    passed = [check_template(tokenizer, load_tokenizer(resolve_tokenizer(str(place))))]
    pairs, _ = verification_pairs(settings.pairs, settings.limit, found, tokenizer)
    return [*passed, check_openvino(place, model, pairs)]


def _to_ollama(
    settings: ExportSettings, found: TrainedRun, model: Path, place: Path, converter: list[str]
) -> list[Verified]:
    tokenizer = load_tokenizer(resolve(str(model)))
    place.mkdir()
    if converter:
        passed, weights = _to_gguf(settings, found, model, place / "model.gguf", converter), "./model.gguf"
    else:
        passed, weights = [], "."
        for file in model.iterdir():
            if file.is_file() and not file.name.startswith("."):
                shutil.copy(file, place / file.name)
    stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in expected_ends(model, tokenizer)]
    write_modelfile(place, weights, Chat(tokenizer), stops)
    return [*passed, Verified("Modelfile", "its template renders conversations as the model's own does")]


_EXPORTS = {"gguf": _to_gguf, "openvino": _to_openvino, "ollama": _to_ollama}


def _next(settings: ExportSettings, target: Path) -> list[str]:
    place = shlex.quote(str(target))
    if settings.to == "gguf":
        return [f"llama-cli -m {place}", f"llama-server -m {place}"]
    if settings.to == "ollama":
        name = shlex.quote(target.name)
        return [f"ollama create {name} -f {place}/Modelfile", f"ollama run {name}"]
    return [f"python -c \"import openvino_genai as g; print(g.LLMPipeline('{target}', 'CPU').generate('Hello'))\""]


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
