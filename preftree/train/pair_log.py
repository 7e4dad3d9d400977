"""Implicit rewards of single pairs, as steps and evaluations compute them anyway, for the run folder.

They stay on the device until a log line is written, which reads the device in any case. In the first epoch a pair's
rewards in its step are measured before it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from preftree.distributed.ranks import Ranks
from preftree.forest import Pair

#: Pairs of a set that are kept track of, the first ones.
MOST_PAIRS = 100_000

#: Places of pairs in their step, and their chosen and rejected rewards, (2, P).
Rewards = tuple[list[int], Tensor]


class PairLog:
    """Collects rewards between two log lines.

    Args:
        sets: the pairs by set; a pair is named by its place in its set.
        ranks: whose pairs are brought together.
    """

    def __init__(self, sets: Mapping[str, Sequence[Pair]], ranks: Ranks) -> None:
        self.ranks = ranks
        self._places = {
            name: {_key(pair): place for place, pair in enumerate(pairs[:MOST_PAIRS])} for name, pairs in sets.items()
        }
        self._waiting: dict[str, list[Rewards]] = {name: [] for name in sets}
        self.last: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in sets}

    def add(self, name: str, pairs: Sequence[Pair], rewards: Sequence[Rewards]) -> None:
        """Keep what a step over `pairs` found out; a pair that is not of the set is left out."""
        known = self._places.get(name)
        if known is None:
            return
        for steps, rewards_2P in rewards:
            found = [known.get(_key(pairs[place]), -1) for place in steps]
            self._waiting[name].append((found, rewards_2P))

    def drain(self) -> list[dict[str, Any]]:
        """What was kept since the last call, one record per set, of all ranks; every rank calls it."""
        return [record for name in self._places if (record := self._drained(name))["pair"]]

    def _drained(self, name: str) -> dict[str, Any]:
        waiting, self._waiting[name] = self._waiting[name], []
        rows = [
            torch.cat([torch.tensor([places], dtype=torch.float64), rewards_2P.to("cpu", torch.float64)])
            for places, rewards_2P in waiting
        ]
        mine = torch.cat(rows, dim=1) if rows else torch.zeros(3, 0, dtype=torch.float64)
        bytes_ = self.ranks.gather_bytes(mine.t().contiguous().view(-1).view(torch.uint8))
        table = torch.cat([each.contiguous().view(torch.float64).view(-1, 3) for each in bytes_])
        table = table[table[:, 0] >= 0]
        pair, chosen, rejected = (table[:, column].tolist() for column in range(3))
        places = [int(place) for place in pair]
        self.last[name] |= dict(zip(places, zip(chosen, rejected, strict=True), strict=True))
        return {
            "set": name,
            "pair": places,
            "chosen": [round(value, 4) for value in chosen],
            "rejected": [round(value, 4) for value in rejected],
        }

    def extremes(self, name: str, count: int) -> list[int]:
        """The places of the pairs with the smallest and with the largest margins, `count` of each, smallest first."""
        order = sorted(self.last.get(name, {}), key=lambda place: self._margin(name, place))
        return order if len(order) <= 2 * count else [*order[:count], *order[-count:]]

    def _margin(self, name: str, place: int) -> float:
        chosen, rejected = self.last[name][place]
        return chosen - rejected


def _key(pair: Pair) -> int:
    return hash((tuple(pair.prompt_ids), tuple(pair.chosen_ids), tuple(pair.rejected_ids)))
