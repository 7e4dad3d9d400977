"""The concept: token trees, forests packed to a token budget, and one integer a token for the mask.

Torch only. `tree` merges prompts into trees, `pack` cuts a batch into forests, `forest` lays them out,
`balance` shards a batch across ranks, `pad` pads forests to a fixed shape, and `pairs` does all of it for preference
pairs; `stream` is the one forest of any number of requests to be scored.
"""

from preftree.forest.forest import Forest, Segment, Shape, idle_forest, upload
from preftree.forest.pack import pack
from preftree.forest.pad import pad_forest
from preftree.forest.pairs import Pair, answers_of, bundles_of_pairs, forests_of_pairs, pair_size, shard_pairs
from preftree.forest.stream import ScoreRequest, Stream, Stretch
from preftree.forest.tree import Bundle, Node, grow

__all__ = [
    "Bundle",
    "Forest",
    "Node",
    "Pair",
    "ScoreRequest",
    "Segment",
    "Shape",
    "Stream",
    "Stretch",
    "answers_of",
    "bundles_of_pairs",
    "forests_of_pairs",
    "grow",
    "idle_forest",
    "pack",
    "pad_forest",
    "pair_size",
    "shard_pairs",
    "upload",
]
