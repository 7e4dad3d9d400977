"""Preference losses by name. To add one, write a pure function of log-probs and settings, and its line below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from preftree.train.losses import coupled, listwise, pairwise, reference_free
from preftree.train.losses.divergences import DIVERGENCES
from preftree.train.losses.logps import LossSettings, PairLogps, join


@dataclass(frozen=True)
class Loss:
    """A loss and what it takes.

    Args:
        values: one loss per pair, (P,).
        reference: needs the reference's log-probs.
        coupled: sees the pairs of the whole step; the order of its values is not that of the pairs.
        divergence: takes another f-divergence than the reverse KL.
        smoothing: takes label smoothing.
        lists: compares all answers of a ranked list, not only the best with the worst.
    """

    values: Callable[[PairLogps, LossSettings], Tensor]
    reference: bool = True
    coupled: bool = False
    divergence: bool = False
    smoothing: bool = False
    lists: bool = False


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(pairwise.sigmoid, divergence=True, smoothing=True),
    "hinge": Loss(pairwise.hinge, divergence=True),
    "ipo": Loss(pairwise.ipo, divergence=True),
    "exo_pair": Loss(pairwise.exo_pair, divergence=True, smoothing=True),
    "nca_pair": Loss(pairwise.nca_pair),
    "robust": Loss(pairwise.robust, divergence=True, smoothing=True),
    "bco_pair": Loss(pairwise.bco_pair),
    "sppo_hard": Loss(pairwise.sppo_hard),
    "aot": Loss(coupled.aot, coupled=True, smoothing=True),
    "aot_unpaired": Loss(coupled.aot_unpaired, coupled=True, smoothing=True),
    "apo_zero": Loss(pairwise.apo_zero),
    "apo_down": Loss(pairwise.apo_down),
    "discopop": Loss(pairwise.discopop, divergence=True),
    "sft": Loss(reference_free.sft, reference=False, divergence=True),
    "sigmoid_norm": Loss(pairwise.sigmoid_norm, divergence=True),
    "dpop": Loss(pairwise.dpop),
    "rpo": Loss(pairwise.rpo, smoothing=True),
    "rdpo": Loss(pairwise.rdpo, smoothing=True),
    "simpo": Loss(reference_free.simpo, reference=False),
    "cpo": Loss(reference_free.cpo, reference=False, smoothing=True),
    "orpo": Loss(reference_free.orpo, reference=False),
    "listwise": Loss(listwise.listwise, divergence=True, lists=True),
}

__all__ = ["DIVERGENCES", "LOSSES", "Loss", "LossSettings", "PairLogps", "join"]
