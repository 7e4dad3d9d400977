"""Forests padded to one shape, for devices that compile for each shape they meet.

Padding comes after the real tokens and leaves. A padding token sees only itself (`subtree_end[k] = k + 1`); a padding
scored token belongs to a leaf one past the last, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from preftree.forest.forest import Forest, Segment, Shape
from preftree.forest.tree import Bundle


def pad_forest(forest: Forest, shape: Shape) -> Forest:
    """`forest`, which is on the host, padded to `shape`. Raises ValueError when it is larger than that."""
    held = Shape(len(forest), len(forest.target_S), len(forest.leaf_ids))
    if held.tokens > shape.tokens or held.scored > shape.scored or held.leaves > shape.leaves:
        raise ValueError(f"a forest of {held} does not fit the fixed shape of {shape}")
    index_T = torch.arange(shape.tokens)
    return replace(
        forest,
        input_ids_T=_padded(forest.input_ids_T, shape.tokens, 0),
        position_ids_T=_padded(forest.position_ids_T, shape.tokens, 0),
        subtree_end_T=torch.cat([forest.subtree_end_T, index_T[held.tokens :] + 1]),
        segments=(*forest.segments, *(Segment(k, k + 1, -1, 0, None) for k in range(held.tokens, shape.tokens))),
        predictor_S=_padded(forest.predictor_S, shape.scored, shape.tokens - 1),
        target_S=_padded(forest.target_S, shape.scored, 0),
        leaf_S=_padded(forest.leaf_S, shape.scored, shape.leaves),
        shape=shape,
    )


def has_room(shape: Shape, bundles: Sequence[Bundle]) -> bool:
    """Do the answers of `bundles` fit `shape`, whatever their tokens?"""
    answers = {(bundle.prompt, answer) for bundle in bundles for answer in bundle.continuations}
    names = sum(len(bundle.leaf_ids) for bundle in bundles)
    fits = names <= shape.leaves and len(bundles) <= shape.pairs
    return fits and sum(len(answer) for _, answer in answers) <= shape.scored


def _padded(column: Tensor, size: int, value: int) -> Tensor:
    return torch.nn.functional.pad(column, (0, size - len(column)), value=value)
