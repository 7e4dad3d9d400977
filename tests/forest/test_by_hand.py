"""One packed batch written out by hand: two pairs under one system turn, and a pair of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preftree.forest import Segment, forests_of_pairs, idle_forest


@dataclass(frozen=True)
class Pair:
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()
    ranks: tuple[int, ...] = (1, 2)


SYSTEM = (1, 2, 3, 4, 5, 6, 7, 8)  # exactly MIN_SHARED
PAIRS = [
    Pair((30, 31), (32, 33), (34,)),
    Pair((*SYSTEM, 20), (21,), (22, 23, 24)),
    Pair((*SYSTEM, 10, 11), (12, 13), (14,)),
]
# fmt: off
INPUT_IDS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 30, 31, 32, 33, 34]
#            └───── system ──────┘ └ 2 ┘  └2c──┘ └2r┘ └1┘ └1c┘ └─ 1r ───┘  └─ 0 ─┘ └─0c─┘ └0r
POSITION  = [0, 1, 2, 3, 4, 5, 6, 7,  8,  9, 10, 11, 10,  8,  9,  9, 10, 11,  0,  1,  2,  3,  2]
END       = [18] * 8          + [13, 13, 12, 12, 13, 18, 15, 18, 18, 18, 23, 23, 22, 22, 23]
PREDICTOR = [9, 10, 9, 13, 13, 15, 16, 19, 20, 19]
TARGET    = [12, 13, 14, 21, 22, 23, 24, 32, 33, 34]
LEAF      = [0, 0, 1, 2, 3, 3, 3, 4, 4, 5]
# fmt: on


def test_every_array() -> None:
    (forest,) = forests_of_pairs(PAIRS, budget=23)
    assert forest.input_ids_T.tolist() == INPUT_IDS
    assert forest.position_ids_T.tolist() == POSITION
    assert forest.subtree_end_T.tolist() == END
    assert forest.predictor_S.tolist() == PREDICTOR
    assert forest.target_S.tolist() == TARGET
    assert forest.leaf_S.tolist() == LEAF
    assert forest.leaf_ids == (4, 5, 2, 3, 0, 1)  # 2i chosen, 2i + 1 rejected
    assert forest.leaf_of_id == (0, 1, 2, 3, 4, 5)
    assert forest.leaf_lengths == (2, 1, 1, 3, 2, 1)
    assert forest.segments == (
        Segment(0, 8, -1, 0, None),
        Segment(8, 10, 0, 8, None),
        Segment(10, 12, 1, 10, 0),
        Segment(12, 13, 1, 10, 1),
        Segment(13, 14, 0, 8, None),
        Segment(14, 15, 4, 9, 2),
        Segment(15, 18, 4, 9, 3),
        Segment(18, 20, -1, 0, None),
        Segment(20, 22, 7, 2, 4),
        Segment(22, 23, 7, 2, 5),
    )
    assert [forest.ancestors(i) for i in (0, 3, 6, 9)] == [[], [0, 1], [0, 4], [7]]
    for array in (forest.input_ids_T, forest.position_ids_T, forest.subtree_end_T, forest.predictor_S):
        assert array.dtype == torch.long


def test_rows_of_the_mask() -> None:
    (forest,) = forests_of_pairs(PAIRS, budget=23)
    mask, narrow = forest.dense_mask(), forest.dense_mask(window=3)
    # The last token of the second pair's rejected answer: system, its own prompt token, its own answer.
    assert mask[17].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 13, 15, 16, 17]
    # A window counts along the path: over the siblings, not over the tokens between.
    assert narrow[15].nonzero().flatten().tolist() == [7, 13, 15]
    assert narrow[22].nonzero().flatten().tolist() == [18, 19, 22]


def test_one_token_less_of_budget_parts_the_trees() -> None:
    groups = forests_of_pairs(PAIRS, budget=22)
    assert [forest.leaf_ids for forest in groups] == [(4, 5, 2, 3), (0, 1)]
    assert [len(forest) for forest in groups] == [18, 5]


def test_one_shared_token_less_is_not_shared() -> None:
    pairs = [Pair(pair.prompt_ids[1:], pair.chosen_ids, pair.rejected_ids) for pair in PAIRS[1:]]
    (forest,) = forests_of_pairs(pairs, budget=100)
    assert len(forest) == 2 * 7 + 2 + 1 + 4 + 3
    assert [segment.start for segment in forest.segments if segment.parent < 0] == [0, 12]


def test_the_best_answer_stands_once_for_all_its_pairs() -> None:
    best, second, third = (12, 13), (14,), (12, 15)
    pairs = [Pair((10, 11), best, third), Pair((10, 11), best, second), Pair((9,), best, second)]
    (forest,) = forests_of_pairs([*pairs, Pair((10, 11), second, third)], budget=100)
    assert forest.input_ids_T.tolist() == [9, 12, 13, 14, 10, 11, 12, 13, 12, 15, 14]
    assert forest.leaf_ids == (4, 5, 0, 2, 1, 7, 3, 6)  # the same answer to another prompt is another leaf
    assert forest.leaf_of_id == (0, 1, 2, 2, 3, 3, 4, 4)
    assert forest.leaf_lengths == (2, 1, 2, 2, 1)
    assert forest.leaf_S.tolist() == [0, 0, 1, 2, 2, 3, 3, 4]
    assert (len(forest), forest.slots, forest.unrolled_tokens) == (11, 5, 3 + 2 + 4 + 4 + 4 + 3 + 3 + 4)


def test_the_smallest_forest_scores_one_token() -> None:
    forest = idle_forest("cpu")
    assert len(forest) == 2
    assert forest.target_S.tolist() == [0]
    assert forest.predictor_S.tolist() == [0]
