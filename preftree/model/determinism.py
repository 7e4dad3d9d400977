"""Training mode without randomness: policy and reference have to be the same function of the weights.

With dropout, router jitter or sampled experts the first loss is not ln 2 and every reward margin is noise. Names of
attributes say little about where a model draws random numbers, but nearly all of them do so only where a module's
`training` flag is set. Hence all modules of the model are kept in evaluation mode while it trains, apart from those
that need the flag for activation checkpointing; their own dropout probabilities are set to 0. Then the model is run:
training mode must agree with evaluation mode, and evaluation mode with itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.errors import ModelError
from preftree.model.score import causal_model

#: Tokens of the trial run.
PROBE_TOKENS = 24
#: Modules that draw random numbers in training mode, whatever their names.
_DROPOUT = nn.modules.dropout._DropoutNd


def remove_randomness(model: nn.Module) -> list[str]:
    """Make training mode compute what evaluation mode computes; returns what was random, for the user.

    Args:
        model: a causal language model, or a PEFT model around one. The language model's `train` method is replaced.

    Raises:
        ModelError: the model is random even in evaluation mode, or cannot be run on token ids.
    """
    model = causal_model(model)
    found = _random_parts(model)
    pinned: set[type[nn.Module]] = set()
    model.train = partial(_train, model, pinned)  # type: ignore[method-assign, assignment]
    for module in _checkpointed(model):
        _zero_dropout(module)
    training = model.training
    try:
        expected, tolerance = _evaluation(model)
        # The last resort costs activation checkpointing, so it comes last.
        for resort in (lambda: None, partial(_zero_configs, model), partial(_pin_all, model, pinned)):
            resort()
            difference = _difference(_logits(model.train()), expected)
            if difference <= tolerance:
                return found
    finally:
        model.train(training)
    raise ModelError(
        f"{type(model).__name__} computes something else in training mode than in evaluation mode (logits differ by "
        f"{difference:.2g}), even with dropout off, so policy and reference would not be the same function"
    )


def check_causal(model: PreTrainedModel) -> None:
    """Raise ModelError if a token's log-probs depend on the tokens after it, as in an encoder without a causal mask."""
    ids_N = _probe_ids(model)
    changed_N = ids_N.clone()
    changed_N[-PROBE_TOKENS // 3 :] = ids_N[: PROBE_TOKENS // 3].flip(0)
    before = slice(0, PROBE_TOKENS - PROBE_TOKENS // 3 - 1)
    with _evaluation_mode(model):
        first, second = (_logits(model, ids)[before] for ids in (ids_N, changed_N))
        tolerance = _tolerance(model, first)
    if _difference(first, second) > tolerance:
        raise ModelError(
            f"{type(model).__name__}: its prediction of a token depends on later tokens, so it cannot generate text "
            'from left to right (for models of the BERT kind, config.json needs "is_decoder": true)'
        )


def _train(model: nn.Module, pinned: set[type[nn.Module]], mode: bool = True) -> nn.Module:
    """`nn.Module.train` for a model that is to be deterministic in training mode as well."""
    for module in model.modules():
        module.training = False
    model.training = mode
    for module in _checkpointed(model):
        module.training = mode and type(module) not in pinned
    return model


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that look at their `training` flag to decide whether to recompute activations."""
    return (module for module in model.modules() if hasattr(module, "gradient_checkpointing"))


def _random_parts(model: nn.Module) -> list[str]:
    """Classes of active dropout modules, and names of attributes that hold a dropout probability or noise level."""
    found: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, _DROPOUT) and module.p:
            found[type(module).__name__] = None
        for name, value in vars(module).items():
            if isinstance(value, float) and value and ("drop" in name or "jitter" in name):
                found[name] = None
    return list(found)


def _zero_dropout(module: nn.Module) -> None:
    for name, value in vars(module).items():
        if isinstance(value, float) and "drop" in name:
            setattr(module, name, 0.0)


def _zero_configs(model: nn.Module) -> None:
    """For layers that read their dropout probability from the config in every forward pass."""
    for module in _checkpointed(model):
        config = getattr(module, "config", None)
        for name, value in list(vars(config).items()) if config is not None else ():
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)


def _pin_all(model: nn.Module, pinned: set[type[nn.Module]]) -> None:
    pinned.update(type(module) for module in _checkpointed(model))


def _evaluation(model: PreTrainedModel) -> tuple[Tensor, float]:
    """Logits in evaluation mode, and how much training mode may differ from them."""
    model.eval()
    first, second = _logits(model), _logits(model)
    noise, tolerance = _difference(first, second), _tolerance(model, first)
    if noise > 10 * tolerance:
        culprit = _first_random_module(model)
        raise ModelError(
            f"{type(model).__name__}: two forward passes on the same tokens in evaluation mode differ by {noise:.2g}, "
            f"first in {culprit}: the model draws random numbers even there, so no log-prob of it can be reproduced"
        )
    return first, max(tolerance, 2 * noise)


def _first_random_module(model: PreTrainedModel) -> str:
    """The first module, in the order of computation, whose output changes between two equal passes."""
    runs: list[list[tuple[str, Tensor]]] = []
    for _ in range(2):
        outputs: list[tuple[str, Tensor]] = []
        runs.append(outputs)
        handles = [
            module.register_forward_hook(partial(_record, outputs, f"{type(module).__name__} ({name})"))
            for name, module in model.named_modules()
        ]
        try:
            _logits(model)
        finally:
            for handle in handles:
                handle.remove()
    return next((name for (name, a), (_, b) in zip(*runs, strict=False) if _difference(a, b) > 0), "its forward pass")


def _record(outputs: list[tuple[str, Tensor]], name: str, module: nn.Module, inputs: object, output: object) -> None:
    if isinstance(output, Tensor) and output.is_floating_point():
        outputs.append((name, output.detach().clone()))


def _probe_ids(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    ids_N = torch.randint(vocabulary, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))
    return ids_N.to(model.device)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_N: Tensor | None = None) -> Tensor:
    """The model's own logits (N, V) of a short random text, in at least float32."""
    ids_N = _probe_ids(model) if ids_N is None else ids_N
    try:
        logits_NV = model(input_ids=ids_N[None], use_cache=False).logits[0]
    except Exception as problem:  # whatever a model of others raises
        raise ModelError(
            f"{type(model).__name__} cannot be run on token ids alone: {type(problem).__name__}: {_first_line(problem)}"
        ) from problem
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max()) if first.shape == second.shape else float("inf")


def _tolerance(model: PreTrainedModel, logits_NV: Tensor) -> float:
    """What rounding may do: kernels for training may add up in another order."""
    return (1e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4) * float(logits_NV.std())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0]
