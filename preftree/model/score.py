"""The one door: `leaf_logprobs(model, forest)` is what training, the reference pass and evaluation call.

A model is attached once: a tiny forest is scored by the fast path and by the model's own plain forward on
single sequences. If they differ, or the fast path cannot run, the next one is tried:

    tree     every prompt once, our attention, log-probs without logits; where a device has several kernels for it,
             the fastest one, measured
    padded   right-padded single sequences through the model's own attention, log-probs without logits
    plain    the model's own logits, for heads that are more than a linear layer

Shape suffixes: T tokens of a forest, S scored tokens, L leaves, D hidden size, B sequences, N their length.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import logging

from preftree.errors import ModelError, SettingsError, did_you_mean
from preftree.forest import Bundle, Forest
from preftree.model import families
from preftree.model.attention import BACKENDS, FOR_DEVICE, MEASURED, Rules, timing
from preftree.model.cpu.fused import fuse, pack_weights, release
from preftree.model.cpu.kernels import NARROW
from preftree.model.logprob import Head, token_logprobs

#: `attention` settings besides the names of tree backends.
PADDED = ("padded", "plain")


@dataclass(frozen=True, eq=False)
class LeafLogprobs:
    """Log-probs of a forest's scored tokens, in float32 (float64 if the model is).

    Args:
        token_S: log p of each scored token.
        forest: what they were computed over; a filled one has filling behind its real tokens and leaves.
    """

    token_S: Tensor
    forest: Forest

    @property
    def leaf_ids(self) -> tuple[int, ...]:
        """The caller's names of the leaves."""
        return self.forest.leaf_ids

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored tokens of each leaf."""
        return self.forest.leaf_lengths

    @property
    def sum_L(self) -> Tensor:
        """log p(continuation | prompt) of each leaf, 0 for those that are filling."""
        return self.forest.sum_by_leaf(self.token_S)

    def by_leaf(self) -> dict[int, Tensor]:
        """Per-token log-probs under the caller's leaf names."""
        parts = self.token_S[: sum(self.lengths)].split(self.lengths)
        return {name: parts[leaf] for name, leaf in zip(self.leaf_ids, self.forest.leaf_of_id, strict=True)}


Scorer = Callable[[Forest], Tensor]  # log p of the scored tokens, (S,)


@dataclass(frozen=True, eq=False)
class Attachment:
    """How a model is scored: the path's name, why it was chosen, and the function itself."""

    name: str
    reason: str
    scorer: Scorer

    @property
    def shares_prompts(self) -> bool:
        return self.name not in PADDED


_attached: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


def leaf_logprobs(model: nn.Module, forest: Forest) -> LeafLogprobs:
    """Log-probs of every continuation in `forest` under `model`, differentiable.

    Args:
        model: a transformers causal language model, or a PEFT model around one. Attached with the automatic
            choice if `attach` was not called before.
        forest: on the model's device.
    """
    attachment = attached(model) or attach(model)
    token_S = attachment.scorer(forest)
    return LeafLogprobs(token_S, forest)


def attached(model: nn.Module) -> Attachment | None:
    """How `model` is scored, None before it was attached."""
    return _attached.get(causal_model(model))


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a PEFT model if it is in one (LoRA layers stay injected)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"need a transformers causal language model, got {type(inner).__name__}")
    return inner


def attach(
    model: nn.Module, attention: str = "auto", *, fixed_shapes: bool = False, room: int | None = None
) -> Attachment:
    """Choose how `model` is scored and check that choice against its plain forward.

    Args:
        attention: "auto", a tree backend's name, "padded" or "plain". A named path that fails its check
            falls back too; the reason says so.
        fixed_shapes: "auto" means the backend whose operations do not depend on the forest's contents.
        room: free bytes on the CPU, of which a part may go to weights in another order; None keeps the one they have.

    Raises:
        SettingsError: unknown name.
        ModelError: no path agrees with the model itself.
    """
    causal = causal_model(model)
    known = ("auto", *BACKENDS, *PADDED)
    if attention not in known:
        raise SettingsError(f"--attention {attention}: choose from {', '.join(known)}.{did_you_mean(attention, known)}")
    stock = _stock_attention(causal)
    probe = probe_forest(causal)
    release(causal)
    with evaluating(causal):
        expected_S, noise = plain_truth(causal, probe, stock)
        refusals: list[str] = []
        agreed: dict[str, tuple[str, Scorer]] = {}  # path → how well
        trees, others = _candidates(causal, attention, fixed_shapes)
        for name in (*trees, *others):
            if agreed and (name in others or causal.device.type not in MEASURED):
                break
            if name in others:
                _set_attention(causal, stock)
            release(causal)
            try:
                packed = pack_weights(causal, room) if name == "native" and room is not None else ""
                scorer = _scorer(causal, name)
                error = float((scorer(probe) - expected_S).abs().max())
            except Exception as problem:  # whatever a foreign model does, the next path may still work
                refusals.append(f"{name}: {type(problem).__name__}: {problem}".splitlines()[0])
                continue
            if not error <= noise:
                refusals.append(f"{name}: log-probs off by {error:.2g} on a test forest (allowed {noise:.2g})")
                continue
            words = f"agrees with the model's plain forward to {error:.1g}"
            agreed[name] = f"{words}; {packed}" if packed else words, scorer
            if name in others:
                break
        if agreed:
            name, measured = _fastest(causal, tuple(agreed))
            agreement, scorer = agreed[name]
            _attached[causal] = attachment = Attachment(name, "; ".join([*refusals, *measured, agreement]), scorer)
            return attachment
    raise ModelError(
        f"{type(causal).__name__}: no way of scoring agrees with the model's own forward: {'; '.join(refusals)}"
    )


def _candidates(causal: PreTrainedModel, attention: str, fixed_shapes: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tree backends, and the paths after them."""
    if attention in PADDED:
        return (), PADDED[PADDED.index(attention) :]
    if attention != "auto":
        return (attention,), PADDED
    names = ("masked",) if fixed_shapes else FOR_DEVICE.get(causal.device.type, ("masked",))
    if causal.dtype not in NARROW:  # the compiled kernel computes in nothing else
        names = tuple(name for name in names if name != "native")
    return names, PADDED


def _fastest(causal: PreTrainedModel, names: tuple[str, ...]) -> tuple[str, list[str]]:
    """The fastest of several tree backends on a layer of this model, and the measurement in words."""
    if len(names) == 1:
        return names[0], []
    forest = timing.sample_forest(causal.device, causal.config.get_text_config().vocab_size)
    layers: list[tuple[Tensor, Tensor, Tensor, Rules]] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
        layers.append((query, key, value, rules))
        return BACKENDS[names[0]](query, key, value, forest, rules)

    families.prepare(causal)(forest, watched)
    query, key, value, rules = layers[0]
    layers.clear()
    times = {name: timing.seconds(BACKENDS[name], query, key, value, forest, rules) for name in names}
    words = ", ".join(f"{name} {1000 * taken:.2f} ms" for name, taken in times.items())
    return timing.fastest(times), [f"a layer's attention over {len(forest)} tokens, forward and backward: {words}"]


def _scorer(causal: PreTrainedModel, name: str) -> Scorer:
    if name == "plain":
        return lambda forest: _with_filling(_plain(causal, forest), forest)
    # The head is looked up at every call: LoRA may be put on it after attaching.
    if name == "padded":
        return lambda forest: _with_filling(_padded(causal, forest), forest)
    body, attend = families.prepare(causal), BACKENDS[name]
    if name == "native":
        fuse(causal)
    return lambda forest: token_logprobs(
        body(forest, attend).index_select(0, forest.predictor_S), forest.target_S, Head.of(causal)
    )


def _pad(forest: Forest) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves as right-padded sequences: ids and mask (B, N), and each scored token's predictor as an index
    into the flattened (B · N)."""
    sequences = forest.unrolled()
    longest = max(len(sequence) for sequence in sequences)
    ids_BN = torch.zeros(len(sequences), longest, dtype=torch.long, device=forest.device)
    mask_BN = torch.zeros_like(ids_BN)
    predictors = []
    for row, (sequence, length) in enumerate(zip(sequences, forest.leaf_lengths, strict=True)):
        ids_BN[row, : len(sequence)] = sequence
        mask_BN[row, : len(sequence)] = 1
        first = row * longest + len(sequence) - length - 1
        predictors.append(torch.arange(first, first + length, device=forest.device))
    return ids_BN, mask_BN, torch.cat(predictors)


def _padded(causal: PreTrainedModel, forest: Forest) -> Tensor:
    """Log-probs from padded sequences, without logits."""
    ids_BN, mask_BN, predictor_S = _pad(forest)
    hidden_BND = causal.base_model(input_ids=ids_BN, attention_mask=mask_BN, use_cache=False).last_hidden_state
    hidden_SD = hidden_BND.flatten(0, 1).index_select(0, predictor_S)
    return token_logprobs(hidden_SD, forest.target_S[: len(predictor_S)], Head.of(causal))


def _with_filling(token_S: Tensor, forest: Forest) -> Tensor:
    """What paths through single sequences leave out of a forest of fixed shape, as zeros."""
    return pad(token_S, (0, len(forest.target_S) - len(token_S)))


def _plain(causal: PreTrainedModel, forest: Forest) -> Tensor:
    """Log-probs from the model's own logits, one sequence at a time: the reference for everything else."""
    parts = []
    for sequence, length in zip(forest.unrolled(), forest.leaf_lengths, strict=True):
        logits_NV = causal(input_ids=sequence[None], use_cache=False).logits[0, -length - 1 : -1]
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        logprobs_NV = torch.log_softmax(logits_NV.to(wide), dim=-1)
        parts.append(logprobs_NV.gather(1, sequence[-length:, None]).squeeze(1))
    return torch.cat(parts)


def probe_forest(causal: PreTrainedModel) -> Forest:
    """A small forest with everything in it: two trees, a shared beginning, a fork of forks, uneven leaves."""
    config = causal.config.get_text_config()
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(config.vocab_size, (count,), generator=random).tolist())

    shared = ids(10)
    bundles = [
        Bundle(shared + ids(6), (ids(5), ids(1)), (0, 1)),
        Bundle(shared + ids(3), (ids(4), ids(6)), (2, 3)),
        Bundle(ids(7), (ids(3), ids(2)), (4, 5)),
    ]
    return Forest.of(bundles, device=causal.device)


def plain_truth(causal: PreTrainedModel, probe: Forest, stock: str | None = None) -> tuple[Tensor, float]:
    """What the model itself says, and how far two of its own computations may be apart in its dtype.

    Random tokens have log-probs of about −log V; a wrong mask or position moves them by tenths and more. Float64
    models still cast to float32 inside (eager softmax, norms), and layers amplify that. In half precisions the model's
    own ways of computing attention differ by tenths too, so there they are the measure: one sequence at a time and
    padded, eager and `stock`, which is what the model is set to afterwards (None: what it is set to now).
    """
    stock = stock or getattr(causal.config, "_attn_implementation", None) or "eager"
    # Eager attention is the model's definition: sdpa, for one, drops Gemma 2's softcap.
    _set_attention(causal, "eager")
    expected_S = _plain(causal, probe)
    if causal.dtype not in (torch.bfloat16, torch.float16):
        _set_attention(causal, stock)
        exact = expected_S.dtype == torch.float32 and causal.dtype == torch.float32
        return expected_S, 2e-3 if exact else 1e-4
    apart = []
    for attention in dict.fromkeys(("eager", stock)):
        _set_attention(causal, attention)
        for way in (_plain, _padded):
            try:
                apart.append(float((way(causal, probe) - expected_S).abs().max()))
            except Exception:  # a model without a padded path is measured against the fixed bound alone
                continue
    return expected_S, min(max(0.25, 2 * max(apart, default=0.0)), 0.5)


def _stock_attention(causal: PreTrainedModel) -> str:
    """The attention the model came with; eager where its default leaves out part of the model (a softcap)."""
    stock = getattr(causal.config, "_attn_implementation", None) or "eager"
    for before, ours in families.interface.NAMES.items():
        stock = before if stock == ours else stock  # attached before
    capped = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else stock


def _set_attention(causal: PreTrainedModel, name: str) -> None:
    """Switch a model's own attention; families without that switch have one implementation and keep it."""
    if causal.config.model_type not in families.FAMILIES and hasattr(causal, "set_attn_implementation"):
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            causal.set_attn_implementation(name)
        finally:
            logging.set_verbosity(level)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, for as long as the block lasts; the mode before it comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
