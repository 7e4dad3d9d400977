"""What of a model's construction decides how it can be scored: state between tokens, and where long paths differ.

A small test forest cannot show either. A leak of state from one answer to the next may be smaller than a half
precision's rounding, and a switch-over at 4096 tokens lies beyond any forest that starts a run quickly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.forest import Bundle, Forest
from preftree.model.logprob import TokenStats

#: Parameters and modules that only layers with a state have: state spaces, delta rules, gated recurrences, RWKV.
_STATE_PARAMETERS = {"A_log", "dt_bias", "time_decay", "recurrent_gate_weight", "recurrent_param", "slope_rate"}
#: Words of `config.layer_types` for layers with a state.
_STATE_LAYERS = ("linear", "mamba", "conv", "recurrent", "hybrid", "lightning", "ssm")


class Score(Protocol):
    """Log-probs of a forest's scored tokens, (S,); fills in their statistics, if there are any to fill."""

    def __call__(self, forest: Forest, stats: TokenStats | None = None) -> Tensor: ...


def refusals(causal: PreTrainedModel) -> dict[str, str]:
    """Kinds of paths ("trees", "padded") that would be wrong for this model, with the reason."""
    refused = {}
    if (part := stateful_part(causal)) is not None:
        refused["trees"] = f"{part} carry a state from token to token, which would go on to the next answer"
    if selects_keys(causal):
        why = "attention selects keys, and which these are depends on what else is in the pass"
        refused |= {"trees": why, "padded": why}
    return refused


def stateful_part(causal: PreTrainedModel) -> str | None:
    """The first part of a model that carries a state from token to token other than by attention, None without one."""
    for kind in getattr(causal.config.get_text_config(), "layer_types", None) or ():
        if any(word in kind for word in _STATE_LAYERS):
            return f"layers of type {kind}"
    for name, module in causal.named_modules():
        convolution = isinstance(module, nn.Conv1d) and module.kernel_size != (1,)
        if convolution or is_recurrent(module):
            return f"modules like {name} ({type(module).__name__})"
    return None


def is_recurrent(module: nn.Module) -> bool:
    """Does a module itself hold the weights of a recurrence over tokens?"""
    own = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    return bool(own & _STATE_PARAMETERS) or isinstance(module, nn.RNNBase)


def selects_keys(causal: PreTrainedModel) -> bool:
    """Does attention look at some keys only, the best (DeepSeek-V3.2, GLM-5, Doge) or those of a hash (Reformer)?

    Which ones these are depends on all keys of the pass, those of padding and of other answers among them.
    """
    config = causal.config.get_text_config()
    chosen = any(getattr(config, name, None) is not None for name in ("index_topk", "keep_window_size"))
    return chosen or "lsh" in (getattr(config, "attn_layers", None) or ())


@dataclass(frozen=True, eq=False)
class Limits:
    """Up to where scores do not depend on what is scored in the same pass.

    Args:
        path: tokens of a sequence beyond which its rotary factors depend on the longest position of the pass (longrope,
            dynamic NTK); None without such a switch-over.
        tokens: of a forest beyond which a layer's scores depend on a token's index instead of its position (Llama 4's
            temperature); None without such a layer.
        rotary: the modules whose factors depend on the pass.
    """

    path: int | None
    tokens: int | None
    rotary: tuple[nn.Module, ...]

    @classmethod
    def of(cls, causal: PreTrainedModel) -> Limits:
        """Read the limits off a model's modules."""
        switches = {module: list(_switch_overs(module)) for module in causal.modules()}
        rotary = tuple(module for module, found in switches.items() if found)
        scales = [
            int(module.floor_scale) - 1
            for module in causal.modules()
            if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale")
        ]
        return cls(
            path=min((switch for found in switches.values() for switch in found), default=None),
            tokens=min(scales, default=None),
            rotary=rotary,
        )

    def hold(self, forest: Forest) -> bool:
        """Is `forest` within the limits?"""
        within = self.path is None or forest.depth <= self.path
        return within and (self.tokens is None or len(forest) <= self.tokens)

    def reset(self) -> None:
        """Forget the factors of earlier passes: dynamic NTK keeps those of the longest sequence so far."""
        for module in self.rotary:
            for name in [each for each in vars(module) if each.endswith("max_seq_len_cached")]:
                setattr(module, name, module.original_max_seq_len)
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                    original = getattr(module, name.removesuffix("inv_freq") + "original_inv_freq", buffer)
                    # A copy: longrope writes into its factors.
                    module.register_buffer(name, original.to(buffer.device, copy=True), persistent=False)

    def applied(self, score: Score, alone: Score) -> Score:
        """`score` for what is within the limits; answers beyond them one at a time by `alone`."""
        if self.path is None and self.tokens is None:
            return score

        def limited(forest: Forest, stats: TokenStats | None = None) -> Tensor:
            self.reset()
            return score(forest, stats) if self.hold(forest) else self._in_parts(forest, score, alone, stats)

        return limited

    def _in_parts(self, forest: Forest, score: Score, alone: Score, stats: TokenStats | None) -> Tensor:
        answers = [
            Bundle(tuple(ids[:-length]), (tuple(ids[-length:]),), (leaf,))
            for leaf, (ids, length) in enumerate(zip(forest.unrolled_ids(), forest.leaf_lengths, strict=True))
        ]
        short = [answer for answer in answers if self.path is None or answer.size <= self.path]
        together = Forest.of(short, forest.device) if short else None
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        if together is not None and self.hold(together):
            parts |= _scored(together, score, stats)
        for answer in answers:
            if answer.leaf_ids[0] not in parts:
                self.reset()
                parts |= _scored(Forest.of([answer], forest.device), alone, stats)
        self.reset()
        ordered = [parts[leaf] for leaf in range(len(answers))]
        if stats is not None:
            stats.values_KS = torch.cat([values_KS for _, values_KS in ordered], dim=1)
        return torch.cat([token_S for token_S, _ in ordered])


def _scored(forest: Forest, score: Score, stats: TokenStats | None) -> dict[int, tuple[Tensor, Tensor]]:
    """Log-probs and statistics of each leaf, by its name; empty statistics where none are asked for."""
    own = TokenStats(stats.collision) if stats is not None else None
    token_S = score(forest, own)
    values_KS = own.values_KS if own is not None else token_S.new_empty(0, len(token_S))
    tokens, values = token_S.split(forest.leaf_lengths), values_KS.split(forest.leaf_lengths, dim=1)
    return {name: (tokens[leaf], values[leaf]) for name, leaf in zip(forest.leaf_ids, forest.leaf_of_id, strict=True)}


def _switch_overs(module: nn.Module) -> Iterator[int]:
    """Lengths beyond which a rotary module's factors follow the longest position of the pass."""
    kinds = getattr(module, "rope_type", None)
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    for layer_type, kind in by_layer.items():
        if isinstance(kind, str) and "dynamic" in kind:
            yield int(module.original_max_seq_len)  # type: ignore[arg-type]
        elif kind == "longrope":
            parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
            parameters = parameters[layer_type] if layer_type is not None else parameters
            yield int(parameters["original_max_position_embeddings"])
