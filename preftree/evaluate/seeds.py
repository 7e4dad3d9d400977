"""Evaluations of one recipe that was trained with several seeds, as one run: the mean of each question over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from preftree.errors import RunError
from preftree.evaluate.heldout import HeldOutScores
from preftree.evaluate.results import Run, find_results, results_files


def find_seeds(folder: str) -> list[Run]:
    """The evaluations in the folders of a folder, in the order of their names.

    Raises:
        RunError: there is none, or one of them is damaged; some have held-out pairs and others have none.
    """
    place = Path(folder)
    inside = sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    found = [find_results(str(path)) for path in inside if results_files(path)]
    if not found:
        raise RunError(
            f"{folder}: no folder in it holds an evaluation. With --seeds each folder after the first is one recipe's "
            f"and has a folder per seed, such as {folder}/seed-1; preftree evaluate --out makes them."
        )
    with_pairs = [run for run in found if run.heldout is not None]
    if with_pairs and len(with_pairs) < len(found):
        without = next(run for run in found if run.heldout is None)
        raise RunError(
            f"{without.folder} has no held-out pairs, {with_pairs[0].folder} has: evaluate all seeds of a recipe with "
            "the same --preferences, or all without"
        )
    return found


def over_seeds(runs: Sequence[Run]) -> Run:
    """The mean of runs that were asked the same questions; it has the name of the folder that holds theirs."""
    first = runs[0]
    scores = {
        name: replace(of_first, value_Q=np.mean([run.scores[name].value_Q for run in runs], axis=0))
        for name, of_first in first.scores.items()
    }
    pairs = [run.heldout for run in runs if run.heldout is not None]
    heldout = None
    if pairs:
        right_P = np.mean([each.right_P for each in pairs], axis=0)
        heldout = HeldOutScores(pairs[0].keys, right_P, np.mean([each.margin_P for each in pairs], axis=0))
    folder = first.folder.parent
    return replace(first, name=folder.name, folder=folder, scores=scores, heldout=heldout, seeds=tuple(runs))
