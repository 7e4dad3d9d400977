"""Every loss with TRL's trainer and with ours, LoRA and full, texts and conversations: the largest differences.

    python scripts/compare_with_trl.py [--losses sigmoid ipo] [--steps 20]

Exits with 1 when a loss or a weight differs by more than 1e-4 (of the first loss, where that is larger than 1).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

TOLERANCE = 1e-4


def main() -> int:
    from tests.support.against_trl import LOSSES, STEPS, Case

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    cases = [
        Case(loss, lora, conversational, LOSSES[loss])
        for loss in asked.losses
        for lora in (True, False)
        for conversational in (False, True)
    ]
    print(f"{'case':48}{'loss, first':>14}{'last':>10}{'difference':>13}{'weights':>10}")
    worst = 0.0
    for case in cases:
        first, last, losses, weights = compare(case, asked.steps)
        print(f"{case!s:48}{first:14.4f}{last:10.4f}{losses:13.1e}{weights:10.1e}", flush=True)
        worst = max(worst, losses / max(1.0, first), weights)
    print(f"{len(cases)} cases, largest difference {worst:.1e} (allowed {TOLERANCE:.0e})")
    return int(worst > TOLERANCE)


def compare(case: object, steps: int) -> tuple[float, float, float, float]:
    """First and last loss, the largest difference of a loss and that of a weight."""
    import trl

    import preftree
    from tests.support.against_trl import Case, run

    assert isinstance(case, Case)
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        os.environ["PREFTREE_CACHE"] = f"{place}/cache"
        ours = run(preftree, case, Path(place) / "ours", steps)
        theirs = run(trl, case, Path(place) / "trl", steps)
    pairs = zip(ours.history, theirs.history, strict=True)
    losses = max(abs(one["loss"] - other["loss"]) for one, other in pairs)
    weights = max(float((weight - theirs.weights[name]).abs().max()) for name, weight in ours.weights.items())
    return ours.history[0]["loss"], ours.history[-1]["loss"], losses, weights


if __name__ == "__main__":
    sys.exit(main())
