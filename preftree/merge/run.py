"""`preftree merge`: write, verify, and only then give the model its name."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from preftree.config.merge import MergeSettings
from preftree.data.encode import EncodedPair, encode_pairs
from preftree.data.record import PreferencePair, Turn
from preftree.data.sources import load_pairs
from preftree.errors import DataError, ModelError, RunError
from preftree.hardware.device import choose_device
from preftree.hardware.memory import peak_memory
from preftree.io.atomic import atomic_path, write_json
from preftree.io.console import next_steps, sayer
from preftree.io.progress import Progress, amount, clock
from preftree.io.run_folder import free_space
from preftree.merge.layers import MergedLayers, NotByLayer
from preftree.merge.shards import BaseShards, write_shards
from preftree.merge.verify import (
    Verified,
    check_eos,
    check_logprobs,
    check_template,
    check_weights,
    expected_ends,
    load_merged_tokenizer,
)
from preftree.merge.whole import WholeModel
from preftree.model.adapted import TrainedRun, find_run
from preftree.model.load import weights_folder
from preftree.publish.card import merged_card
from preftree.publish.hub import check_writable, upload

#: What says that a folder is a merged model of ours, with how it was made and verified.
RECORD = "merge.json"
#: Pairs to verify on where the run's own data is gone.
_FALLBACK = (
    ("What is the capital of France?", "Paris.", "That is a good question. The capital of France is Paris."),
    ("Name three primary colors.", "Red, yellow and blue.", "There are many colors, and red is one of them."),
    ("What is 12 + 30?", "42.", "Let us add them step by step. The sum of 12 and 30 is 42."),
)


def run(settings: MergeSettings) -> None:
    """Merge as the settings say, or verify what was merged.

    Raises:
        PreftreeError: whatever the user can fix; nothing is left of a model that fails a check.
    """
    console = Console(soft_wrap=True)
    say = sayer(console)
    started = time.perf_counter()
    if settings.push:
        check_writable(settings.push, private=settings.private)
    target = merge(settings, console)
    say(f"           in {clock(time.perf_counter() - started)}, peak memory {amount(peak_memory())}")
    if settings.verify:
        return
    if settings.push:
        say(f"pushed     {upload(settings.push, target, private=settings.private)}")
    place = shlex.quote(str(target))
    next_steps(
        say,
        f"preftree evaluate --model {place} --out {shlex.quote(f'{target}-scores')}",
        f"preftree export {place} --to gguf --out {shlex.quote(f'{target}.gguf')}",
        f"vllm serve {place}",
    )


def merge(settings: MergeSettings, console: Console) -> Path:
    """Merge, or verify; returns the folder of the merged model. Raises as `run` does."""
    say = sayer(console)
    found = find_run(settings.run, settings.model)
    if not found.adapter:
        raise ModelError(f"{settings.run} is a whole model, so there is no adapter to merge.")
    target = Path(settings.out or settings.verify or "")
    if settings.out:
        _check_target(settings, target)
    say(f"merge      {settings.run} into {found.base_name}")
    base = weights_folder(found.base_source, **_download(found))
    tokenizer = found.tokenizer()
    pairs, where = verification_pairs(settings.pairs, settings.limit, found, tokenizer)
    merger = _Merger(found, base, _dtype(settings), say)
    if settings.verify:
        _report(say, merger.verify(target, tokenizer, pairs), f"{target} is {settings.run} merged")
        return target
    _check_room(merger, target)
    with _replacing(target, settings.overwrite) as folder:
        merger.write(folder, tokenizer, Progress(console, "           writing ", "files"))
        say(f"verify     weights, template, end tokens, and log-probs on {len(pairs)} pairs ({where})")
        passed = merger.verify(folder, tokenizer, pairs)
        facts = {each.name: each.found for each in passed}
        write_json(folder / RECORD, {"adapter": str(found.folder.absolute()), "base": found.base, "verified": facts})
        merged_card(found, facts, target.absolute().name).save(folder / "README.md")
    _report(say, passed, f"{target}: {amount(BaseShards(target).size())}, {merger.how}")
    return target


class _Merger:
    """A run's merged tensors: written, and compared with what is in a folder.

    Args:
        base: folder of the base's files, None for a GGUF file.
        dtype: of what is written, None for that of the base's files.
    """

    def __init__(
        self, run: TrainedRun, base: Path | None, dtype: torch.dtype | None, say: Callable[[str], None]
    ) -> None:
        self.run, self.base = run, base
        self.how = "merged one layer at a time"
        self.source: MergedLayers | WholeModel
        try:
            if base is None:
                raise NotByLayer("the base is a large GGUF file")
            self.source = MergedLayers(BaseShards(base), run.folder)
            self.dtype = dtype or self.source.shards.dtype()
            self.changed = len(self.source.changed)
        except NotByLayer as reason:
            say(f"           the whole model is loaded: {reason}")
            self.dtype = dtype or (torch.float32 if base is None else BaseShards(base).dtype())
            self.source = WholeModel(run, self.dtype)
            self.how = "merged in memory as a whole"

    def size(self) -> int:
        """Bytes that will be written, about."""
        return self.source.size(self.dtype)

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
        """All files of the model but its card."""
        folder.mkdir()
        if isinstance(self.source, WholeModel):
            self.source.write(folder)
        else:
            write_shards(folder, self._files(self.source), self._cast(self.source), progress)
            self.source.config.dtype = self.dtype
            self.source.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        own = self.base is not None and (self.base / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(str(self.base)) if own else GenerationConfig()
        generation.eos_token_id = self.ends(tokenizer)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.save_pretrained(folder)

    def _cast(self, source: MergedLayers) -> Callable[[str], Tensor]:
        """Name -> the merged tensor in the precision that is written."""

        def get(name: str) -> Tensor:
            value = source.get(name)
            return value.to(self.dtype) if value.is_floating_point() else value

        return get

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer of the merged model."""
        return expected_ends(self.base, tokenizer)

    def _files(self, source: MergedLayers) -> dict[str, list[str]]:
        tied = not source.extra and set(source.tied)
        by_file = source.shards.by_file()
        files = {
            file: [name for name in names if not tied or name not in source.tied] for file, names in by_file.items()
        }
        files[list(files)[-1]] += source.extra
        return {file: names for file, names in files.items() if names}

    def verify(self, folder: Path, tokenizer: PreTrainedTokenizerBase, pairs: list[EncodedPair]) -> list[Verified]:
        """All checks, the quick ones first. Raises VerificationError at the first that fails."""
        merged = load_merged_tokenizer(folder)
        passed = [check_template(tokenizer, merged), check_eos(self.ends(tokenizer), folder, merged)]
        if isinstance(self.source, WholeModel):
            passed.append(self.source.check(folder))
            self.source.free()  # the next check loads two models, one after the other
        else:
            shards = BaseShards(folder)
            names = [name for names in self._files(self.source).values() for name in names]
            passed.append(check_weights(names, self.source.get, shards.get, shards.names))
        return [*passed, check_logprobs(self.run, folder, pairs, choose_device().value)]


def _dtype(settings: MergeSettings) -> torch.dtype | None:
    return None if settings.dtype == "auto" else getattr(torch, settings.dtype)


def _download(run: TrainedRun) -> Mapping[str, object]:
    return {} if run.base_source.local else run.hub_options


def verification_pairs(
    file: str | None, limit: int, run: TrainedRun, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[EncodedPair], str]:
    """A few pairs to verify on, and where they are from: a file's, the run's own, or built-in ones."""
    data = run.group("data")
    name = file or data.get("validation_file") or data.get("dataset_name")
    encode = partial(
        encode_pairs,
        tokenizer=tokenizer,
        max_length=int(data.get("max_length") or 512),
        max_prompt_length=int(data.get("max_prompt_length") or 384),
    )
    try:
        if name is None:
            raise DataError("the run does not say what it was trained on")
        encoded, _ = encode(load_pairs(str(name), limit=limit))
        if encoded:
            return encoded, str(name)
    except DataError:
        if file:
            raise
    rows = [
        PreferencePair(None, (Turn("user", prompt),), chosen, rejected, "a built-in pair", row)
        for row, (prompt, chosen, rejected) in enumerate(_FALLBACK)
    ]
    encoded, _ = encode(rows)
    return encoded, "built-in ones, as the run's own data is not there"


def _check_target(settings: MergeSettings, target: Path) -> None:
    """Refuse to write over what is there, before anything is loaded."""
    if target.exists() and not target.is_dir():
        raise RunError(f"--out {target} is a file. Give a folder.")
    if target.resolve() == Path(settings.run).resolve():
        raise RunError(f"--out {target} is the run itself. Give another folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    ours = (target / RECORD).is_file()
    if not ours or not settings.overwrite:
        what = "a merged model" if ours else "files that preftree merge did not write"
        advice = "Give another folder" + (", or add --overwrite true." if ours else ".")
        raise RunError(f"--out {target} holds {what}; nothing is overwritten. {advice}")


def _check_room(merger: _Merger, target: Path) -> None:
    free, needed = free_space(target), merger.size()
    if free < needed:
        raise RunError(f"--out {target}: {amount(needed)} are needed and {amount(free)} are free. Give another place.")


@contextmanager
def _replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that becomes `target`, in place of an earlier model there if that is asked for."""
    earlier = target.with_name(f".{target.name}.earlier")
    with atomic_path(target) as folder:
        yield folder
        if overwrite and target.is_dir():
            shutil.rmtree(earlier, ignore_errors=True)
            target.rename(earlier)
    shutil.rmtree(earlier, ignore_errors=True)


def _report(say: Callable[[str], None], passed: list[Verified], done: str) -> None:
    for each in passed:
        say(f"verified   {each.name}: {each.found}")
    say(f"done       {done}")
