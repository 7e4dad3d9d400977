"""Step 3: pairs per second, MFU and memory beside TRL's best setting, on the shapes of real models.

Each side of a shape runs in a process of its own, forked from this one after the imports (which take as long as a
measurement) and before the card is touched. A side that takes longer than its part of the time is stopped; so is
TRL's search for its best setting, which then counts as far as it got.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import cuda_shapes
import report

#: The shapes, those that decide most first.
SHAPES = ("smollm2-135m", "llama-2-7b", "mpt-7b", "smollm2-1.7b-long")
#: What CUDA says in a process that was forked from one that had touched the card.
_TOUCHED = ("re-initialize CUDA", "initialization error")
#: How the time is divided between the sides: TRL's search tries up to nine settings.
WEIGHTS = {"preftree": 1.0, "trl": 1.6}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", required=True)
    parser.add_argument("--seconds", type=float, default=290)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    step = report.StepReport(Path(args.output) / "speed.json", args.seconds)
    shapes = ("tiny", "tiny-long") if args.tiny else SHAPES
    _import_everything()
    found: dict[str, dict[str, Any]] = {shape: {} for shape in shapes}
    sides = [(shape, side) for shape in shapes for side in cuda_shapes.SIDES]
    method, steps = "fork", 2 if args.tiny else 4
    for number, (shape, side) in enumerate(sides):
        rest = sum(WEIGHTS[name] for _, name in sides[number:])
        seconds = max(1.0, (step.left() - 5) * WEIGHTS[side] / rest)
        numbers = _in_a_process(method, shape, side, args.device, steps, seconds)
        if method == "fork" and any(words in numbers.get("why", "") for words in _TOUCHED):
            method = "spawn"  # an import has touched the card: each process imports for itself
            numbers = _in_a_process(method, shape, side, args.device, steps, seconds)
        found[shape][side] = numbers
        step.put(shapes=found)
        print(f"{shape:20}{side:10}{_said(found[shape][side])}", flush=True)
    step.finish()
    return 0 if all("pairs_per_second" in numbers for sides in found.values() for numbers in sides.values()) else 1


def _import_everything() -> None:
    """Once, for all forks; nothing here starts threads or touches the card."""
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import preftree.model.score
    import preftree.train.trainer  # noqa: F401


def _in_a_process(method: str, shape: str, side: str, device: str, steps: int, seconds: float) -> dict[str, Any]:
    """What a side measured, or why it has no numbers."""
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, shape, side, device, steps, seconds))
    process.start()
    sender.close()
    try:
        # Half as long again for what cannot be cut short: the timed run after the search.
        if not receiver.poll(1.5 * seconds):
            return {"why": f"stopped after {1.5 * seconds:.0f} s"}
        found: dict[str, Any] = receiver.recv()
        return found
    except EOFError:
        return {"why": "the process died"}
    finally:
        process.kill()
        process.join()


def _measure(sender: Any, shape: str, side: str, device: str, steps: int, seconds: float) -> None:
    try:
        found = cuda_shapes.measure(shape, side, device, steps, seconds)
    except BaseException as problem:
        traceback.print_exc()
        found = {"why": f"{type(problem).__name__}: {problem}"[:500]}
    sender.send(found)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no exit handlers of the parent's libraries


def _said(numbers: dict[str, Any]) -> str:
    if "pairs_per_second" not in numbers:
        return str(numbers.get("why"))
    return (
        f"{numbers['pairs_per_second']:8.2f} pairs/s  {numbers['peak_gib']:6.1f} GiB  MFU {numbers['mfu']:.0%}  "
        f"{numbers['setting']}"
    )


if __name__ == "__main__":
    report.leave(main(sys.argv[1:]))
