"""Draw docs/token_tree.svg: one preference pair as a padded batch, as a token tree, and the tree's attention mask.

    python scripts/draw_token_tree.py > docs/token_tree.svg

Positions, subtree ends and the mask are those of a forest that `preftree.forest` builds, so the picture cannot say
anything else than the code. Labels outside the boxes have one gray that can be read on white and on black.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from preftree.forest import Bundle, Forest

PROMPT, CHOSEN, REJECTED = ("The", "sky", "is", "…"), ("blue", "today", "."), ("green", ".")
BLUE, GREEN, ORANGE, GRAY = "#2f6fb5", "#2c7d4f", "#b5532f", "#7a828e"
COLORS = {"prompt": BLUE, "chosen": GREEN, "rejected": ORANGE}
WIDTH, HEIGHT, BOX, GAP, CELL = 900, 330, 46, 4, 20
FONT = "font-family='-apple-system,Segoe UI,Helvetica,Arial,sans-serif'"


def main() -> int:
    """Write the picture to standard output."""
    sys.stdout.write(drawing())
    return 0


def drawing() -> str:
    """The picture as SVG text."""
    words = (*PROMPT, *CHOSEN, *REJECTED)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    prompt, chosen, rejected = (tuple(numbers[word] for word in part) for part in (PROMPT, CHOSEN, REJECTED))
    forest = Forest.of([Bundle(prompt, (chosen, rejected), (0, 1))])
    assert len(forest) == len(words)
    parts = [*_padded(), *_tree(forest, words), *_mask(forest)]
    title = (
        "A preference pair as a padded batch of 14 tokens and as a token tree of 9, "
        "with the attention mask that one integer per token describes"
    )
    size = f"viewBox='0 0 {WIDTH} {HEIGHT}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' aria-label='{title}' {FONT}>"
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>\n"])


def _kind(index: int) -> str:
    if index < len(PROMPT):
        return "prompt"
    return "chosen" if index < len(PROMPT) + len(CHOSEN) else "rejected"


def _text(
    x: float, y: float, text: str, size: int = 13, color: str = GRAY, anchor: str = "start", weight: int = 400
) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f"<text x='{x:g}' y='{y:g}' font-size='{size}' font-weight='{weight}' fill='{color}' text-anchor='{anchor}'>"
        f"{escaped}</text>"
    )


def _box(x: float, y: float, word: str, color: str, opacity: float = 1) -> Iterator[str]:
    yield f"<rect x='{x:g}' y='{y:g}' width='{BOX}' height='28' rx='5' fill='{color}' fill-opacity='{opacity:g}'/>"
    yield _text(x + BOX / 2, y + 19, word, color="#ffffff", anchor="middle", weight=600)


def _padded() -> Iterator[str]:
    """Two sequences of equal length, the prompt in both."""
    yield _text(10, 24, "Padded batch: 14 tokens computed", size=15, weight=600)
    for row, (answer, kind) in enumerate(((CHOSEN, "chosen"), (REJECTED, "rejected"))):
        y = 40 + row * 36
        for place, word in enumerate((*PROMPT, *answer)):
            color = BLUE if place < len(PROMPT) else COLORS[kind]
            yield from _box(10 + place * (BOX + GAP), y, word, color)
        for place in range(len(PROMPT) + len(answer), len(PROMPT) + len(CHOSEN)):
            x = 10 + place * (BOX + GAP)
            yield (
                f"<rect x='{x + 0.5:g}' y='{y + 0.5:g}' width='{BOX - 1}' height='27' rx='5' fill='none' "
                f"stroke='{GRAY}' stroke-dasharray='3 3'/>"
            )
            yield _text(x + BOX / 2, y + 19, "pad", anchor="middle")


def _tree(forest: Forest, words: tuple[str, ...]) -> Iterator[str]:
    """The prompt once, both answers below it; then the same tokens in one row with their numbers."""
    yield _text(10, 150, "Token tree: 9 tokens computed, the prompt once", size=15, weight=600)
    start = 10 + len(PROMPT) * (BOX + GAP)
    for y, kind in ((164, "chosen"), (200, "rejected")):
        yield (
            f"<path d='M {start - GAP} 196 C {start + 9} 196, {start + 5} {y + 14}, {start + 18} {y + 14}' fill='none' "
            f"stroke='{COLORS[kind]}' stroke-width='2.5'/>"
        )
    places = {"prompt": (10, 182), "chosen": (start + 18, 164), "rejected": (start + 18, 200)}
    for index, word in enumerate(words):
        kind = _kind(index)
        x, y = places[kind]
        places[kind] = (x + BOX + GAP, y)
        yield from _box(x, y, word, COLORS[kind])
    step = 40
    for y, name, values in (
        (262, "index k", range(len(forest))),
        (286, "position", forest.position_ids_T.tolist()),
        (310, "end[k]", forest.subtree_end_T.tolist()),
    ):
        yield _text(10, y, name)
        for index, value in enumerate(values):
            yield _text(92 + index * step, y, str(value), anchor="middle", weight=600)
    for index in range(len(forest)):
        yield f"<rect x='{92 + index * step - 14}' y='240' width='28' height='6' rx='3' fill='{COLORS[_kind(index)]}'/>"


def _mask(forest: Forest) -> Iterator[str]:
    """Which query attends which key: rows are queries, columns are keys."""
    left, top = 640, 66
    size = len(forest)
    yield _text(left - 120, 24, "Attention mask, from one integer per token", size=15, weight=600)
    yield _text(left - 120, 46, "query q attends key k  ⇔  k ≤ q < end[k]")
    ends = forest.subtree_end_T.tolist()
    for query in range(size):
        for key in range(size):
            seen = key <= query < ends[key]
            look = f"fill='{COLORS[_kind(key)]}'" if seen else f"fill='{GRAY}' fill-opacity='0.16'"
            x, y = left + key * CELL, top + query * CELL
            yield f"<rect x='{x}' y='{y}' width='{CELL - 2}' height='{CELL - 2}' rx='3' {look}/>"
    for name, first, count in (("prompt", 0, len(PROMPT)), ("chosen", 4, len(CHOSEN)), ("rejected", 7, len(REJECTED))):
        middle = top + (first + count / 2) * CELL + 4
        yield _text(left - 10, middle, name, color=GRAY, anchor="end", weight=600)
    yield _text(left + size * CELL / 2, top + size * CELL + 18, "keys", anchor="middle")
    yield _text(left + size * CELL + 8, top + size * CELL / 2 + 4, "queries")


if __name__ == "__main__":
    sys.exit(main())
