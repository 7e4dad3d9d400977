"""The goals, beside what was found."""

from __future__ import annotations

from collections import Counter
from typing import Any

#: preftree's pairs/s over those of TRL's best setting.
SPEED = 2.5
#: Useful FLOPs over the card's own matrix product.
MFU = 0.5
#: preftree's peak memory over that of TRL's best setting.
MEMORY = 0.5
#: Prefix sharing with packing, as published: pairs/s over a padded baseline.
PUBLISHED = (1.17, 1.41)


def summary_lines(results: dict[str, Any]) -> list[str]:
    """Every goal and result, one per line."""
    lines = ["goals and results", "-----------------"]
    for name, found in results.items():
        state = "complete" if found.get("complete") else "NOT complete"
        lines.append(f"{name}: {state}, exit code {found['exit_code']}, {found.get('took_s', '?')} s")
        lines += [f"  {line}" for line in _LINES[name](found)]
    return lines


def _exactness(found: dict[str, Any]) -> list[str]:
    lines = []
    for part in ("attention", "head", "families"):
        counts = Counter(case["status"] for case in found.get(part, []))
        lines.append(f"{part}: " + (", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "nothing"))
        for case in found.get(part, []):
            if case["status"] in ("wrong", "failed"):
                lines.append(f"  {case['status'].upper()} {case['case']}: {case.get('why') or case.get('error')}")
    return lines


def _training(found: dict[str, Any]) -> list[str]:
    if "losses" not in found:
        return [found.get("why", "no losses")]
    lines = [f"model: {found['model']}; {len(found['losses'])} steps in {found['dtype']}, {found['seconds']:.0f} s"]
    lines.append(f"first loss {found['losses'][0]:.4f} (ln 2 = 0.6931), last ten {found['last_ten']:.4f}")
    if found.get("compared"):
        lines.append(
            f"beside the CPU in float32, {found['compared']} steps: largest difference {found['largest']:.4f}, "
            f"mean {found['mean']:.4f}"
        )
    return lines


def _speed(found: dict[str, Any]) -> list[str]:
    lines = []
    for shape, sides in found.get("shapes", {}).items():
        ours, theirs = sides.get("preftree", {}), sides.get("trl", {})
        if "pairs_per_second" in ours:
            lines.append(
                f"{shape}: preftree {ours['pairs_per_second']:.2f} pairs/s, {ours['peak_gib']:.1f} GiB, "
                f"MFU {_goal(ours['mfu'], MFU, '{:.0%}')} ({ours['setting']})"
            )
        if "pairs_per_second" in theirs:
            lines.append(
                f"{shape}: TRL {theirs['pairs_per_second']:.2f} pairs/s, {theirs['peak_gib']:.1f} GiB, "
                f"MFU {theirs['mfu']:.0%} ({theirs['setting']})"
            )
        if "pairs_per_second" in ours and "pairs_per_second" in theirs:
            speed = ours["pairs_per_second"] / theirs["pairs_per_second"]
            memory = ours["peak_gib"] / theirs["peak_gib"]
            above = " (published prefix sharing: {} to {} ×)".format(*PUBLISHED)
            lines.append(
                f"{shape}: {_goal(speed, SPEED, '{:.2f} ×')} TRL's best{above}, "
                f"memory {_goal(memory, MEMORY, '{:.2f} ×', less=True)}"
            )
        lines += [f"{shape}: {side} {what['why']}" for side, what in sides.items() if "why" in what]
    return lines or ["nothing was measured"]


def _profile(found: dict[str, Any]) -> list[str]:
    lines = [f"{found.get('shape', '?')}, one step {found.get('wall_ms', float('nan')):.1f} ms"]
    return lines + [
        f"{kind:24}{part['ms']:9.1f} ms {part['share']:6.1%}" for kind, part in found.get("kinds", {}).items()
    ]


def _goal(value: float, goal: float, form: str, less: bool = False) -> str:
    """A value with its goal and whether it is reached."""
    reached = value <= goal if less else value >= goal
    return (
        f"{form.format(value)} [goal {'≤' if less else '≥'} {form.format(goal)}: {'reached' if reached else 'MISSED'}]"
    )


_LINES = {"exactness": _exactness, "training": _training, "speed": _speed, "profile_step": _profile}
