"""Is a merged model what it is said to be? Every check has a name, and a model that fails one is not kept.

weights     each tensor in the files is the base's, or the base's with the adapter merged in
template    conversations are rendered and tokenized as the run's tokenizer does
eos         generation ends at the same tokens
log-probs   answers of real pairs are as probable as under base + adapter, within `BOUNDS`
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from preftree.data.chat import Chat, Messages
from preftree.data.encode import EncodedPair
from preftree.errors import ModelError
from preftree.evaluate.preference import PairScores, score_pairs
from preftree.merge.shards import BaseShards
from preftree.model.adapted import TrainedRun, open_trained
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.model.score import attach

#: Dtype of the written weights -> by how many nats per token the log-prob of the worst answer may differ from base +
#: adapter, both computed in float32. Writing rounds each merged weight once. SmolLM2 in bfloat16: 0.08 for the worst of
#: 16 answers, which are a few tokens long; longer ones average their roundings.
BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.04, torch.bfloat16: 0.3}
#: Rounding of a weight that two machines may do differently, in units of the dtype's own.
_ROUNDINGS = 4

_PROBES: Sequence[Messages] = (
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "  Spaces,\nlines and é\u4e2d\U0001f600 "}],
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4."},
        {"role": "user", "content": "And 3 + 3?"},
    ],
)
_SYSTEM = {"role": "system", "content": "Answer in one sentence."}


@dataclass(frozen=True)
class Verified:
    """One check that a merged model has passed, and what was found."""

    name: str
    found: str


class VerificationError(ModelError):
    """A merged model failed a check; `check` is its name."""

    def __init__(self, check: str, why: str) -> None:
        super().__init__(f"the merged model is not what it should be ({check}): {why}")
        self.check = check


def check_weights(
    names: Iterable[str], expected: Callable[[str], Tensor], found: Callable[[str], Tensor], written: Iterable[str]
) -> Verified:
    """Compare every tensor of the files with what it should be.

    Args:
        names: of all tensors that there should be.
        expected: the tensor of a name, in any precision.
        found: the tensor in the files.
        written: names in the files.

    Raises:
        VerificationError: names the first tensors that differ.
    """
    wanted, there = set(names), set(written)
    if wanted != there:
        missing, more = sorted(wanted - there), sorted(there - wanted)
        word = f"{missing[0]} is missing" if missing else f"{more[0]} should not be there"
        raise VerificationError("weights", f"{word} ({len(missing)} missing, {len(more)} too many)")
    wrong = [name for name in sorted(wanted) if not _same(expected(name), found(name))]
    if wrong:
        raise VerificationError("weights", f"{len(wrong)} of {len(wanted)} tensors differ, the first is {wrong[0]}")
    return Verified("weights", f"{len(wanted)} tensors in the files are the merged ones")


def _same(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(expected, found)
    wide, read = expected.double(), found.double()
    unit = torch.finfo(found.dtype).eps * float(wide.abs().max()) if wide.numel() else 0.0
    return bool(((wide - read).abs() <= _ROUNDINGS * unit).all())


def check_template(expected: PreTrainedTokenizerBase, found: PreTrainedTokenizerBase) -> Verified:
    """Compare what two tokenizers make of conversations. Raises VerificationError with the first that differs."""
    ours, theirs = Chat(expected), Chat(found)
    count = 0
    for probe in _PROBES:
        for messages in (probe, [_SYSTEM, *probe]):
            if len(messages) > len(probe) and ours.folds_system:
                continue
            text, other = ours.prompt(messages), theirs.prompt(messages)
            if text != other:
                at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
                raise VerificationError(
                    "template", f"a conversation is rendered as …{other[at : at + 40]!r}, not …{text[at : at + 40]!r}"
                )
            if ours.tokenize([text]) != theirs.tokenize([text]):
                raise VerificationError("template", "a rendered conversation becomes other tokens")
            count += 1
    return Verified("template", f"{count} conversations are rendered and tokenized equally")


def expected_ends(base: Path | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the base's own, the tokenizer's, and the one that ends a turn of the template."""
    there = base is not None and (base / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(str(base)) if there else None
    own = generation.eos_token_id if generation is not None else None
    ids = own if isinstance(own, list) else [own]
    return sorted({int(i) for i in (*ids, tokenizer.eos_token_id, Chat(tokenizer).terminator_id) if i is not None})


def check_eos(expected: Sequence[int], folder: Path, tokenizer: PreTrainedTokenizerBase) -> Verified:
    """Compare where generation ends. Raises VerificationError where it ends at other tokens."""
    file = folder / "generation_config.json"
    if not file.is_file():
        raise VerificationError("eos", "generation_config.json is missing, so a server would not know where to end")
    found = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    ids = sorted(found if isinstance(found, list) else [] if found is None else [found])
    if ids != list(expected):
        raise VerificationError("eos", f"generation ends at tokens {ids}, and should at {list(expected)}")
    if tokenizer.eos_token_id not in expected:
        raise VerificationError("eos", f"the tokenizer ends texts with {tokenizer.eos_token_id}, not {list(expected)}")
    names = ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in ids)
    return Verified("eos", f"answers end at {names}")


def check_logprobs(run: TrainedRun, folder: Path, pairs: Sequence[EncodedPair], device: str) -> Verified:
    """Compare the log-probs of real answers under the merged model and under base + adapter, in float32.

    Raises:
        VerificationError: an answer differs by more than the bound of the written precision.
    """
    expected = pair_scores(open_trained(run, device, torch.float32), pairs)
    source, written = resolve(str(folder)), BaseShards(folder).dtype()
    found = pair_scores(load_model(source, torch.float32).to(device), pairs)
    return compare_logprobs(expected, found, pairs, BOUNDS[written], str(written).removeprefix("torch."))


def compare_logprobs(
    expected: PairScores, found: PairScores, pairs: Sequence[EncodedPair], bound: float, precision: str
) -> Verified:
    """Compare log-probs of the answers of pairs.

    Args:
        bound: nats per token of an answer that are allowed for the `precision` of the weights.

    Raises:
        VerificationError: an answer differs by more.
    """
    tokens_P = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]).double()
    difference_PA = (_both(expected) - _both(found)).abs() / tokens_P
    worst = float(difference_PA.max())
    if not worst <= bound:  # written so that NaN does not pass
        row = int(difference_PA.max(1).values.argmax())
        raise VerificationError(
            "log-probs",
            f"an answer of {pairs[row].source} differs by {worst:.2g} nats per token from what it should be; "
            f"{bound:g} is allowed for {precision}",
        )
    answers = f"{2 * len(pairs)} answers of {len(pairs)} pairs"
    return Verified("log-probs", f"{answers} are within {worst:.1g} nats per token (allowed: {bound:g})")


def pair_scores(model: Any, pairs: Sequence[EncodedPair]) -> PairScores:
    """Log-probs of the answers of pairs under a model, which is gone when this returns."""
    try:
        with attach(model) as scorer:
            return score_pairs(scorer, pairs)
    finally:
        del model
        gc.collect()  # two models in memory would be one too many


def _both(scores: PairScores) -> Tensor:
    return torch.stack([scores.chosen_P, scores.rejected_P], dim=1).double()


def load_merged_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a merged model. Raises VerificationError where there is none."""
    try:
        return load_tokenizer(resolve(str(folder)))
    except ModelError as problem:
        raise VerificationError("template", str(problem)) from problem
