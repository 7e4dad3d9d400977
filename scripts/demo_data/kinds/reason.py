"""Know or work out one thing, and say nothing else."""

from __future__ import annotations

import random

from scripts.demo_data.kinds.base import Filled, Kind, Split
from scripts.demo_data.kinds.pools import CATEGORIES, OPPOSITES, SORT_WORDS, Category

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
_UNITS: dict[Split, tuple[tuple[str, str, int], ...]] = {
    "train": (
        ("hours", "minutes", 60),
        ("weeks", "days", 7),
        ("meters", "centimeters", 100),
        ("kilometers", "meters", 1000),
        ("dollars", "cents", 100),
        ("kilograms", "grams", 1000),
        ("decades", "years", 10),
    ),
    "heldout": (
        ("minutes", "seconds", 60),
        ("centuries", "years", 100),
        ("weeks", "days", 7),
        ("meters", "centimeters", 100),
        ("hours", "minutes", 60),
    ),
}
_QUANTITIES: dict[Split, tuple[int, ...]] = {"train": (2, 3, 5, 6, 8), "heldout": (4, 7, 9)}


def _two_categories(split: Split, rng: random.Random) -> tuple[Category, Category]:
    """Two categories that nobody would mix up: a carrot must not count as a kind of tree."""
    one = rng.choice(CATEGORIES[split])
    return one, rng.choice([other for other in CATEGORIES[split] if other.group != one.group])


def _fill_yes_no(split: Split, rng: random.Random) -> Filled:
    category, other = _two_categories(split, rng)
    answer = rng.choice(("Yes", "No"))
    item = rng.choice((category if answer == "Yes" else other).items)
    slots = {"item": item, "category": category.singular}
    return Filled(slots, answer, {"type": "one_of", "accept": [answer]}, "No" if answer == "Yes" else "Yes")


def _fill_odd_one(split: Split, rng: random.Random) -> Filled:
    category, other = _two_categories(split, rng)
    odd = rng.choice(other.items)
    words = [*rng.sample(category.items, 3), odd]
    rng.shuffle(words)
    belonging = min((word for word in words if word != odd), key=len)
    return Filled({"words": ", ".join(words)}, odd, {"type": "one_of", "accept": [odd]}, belonging)


def _fill_opposite(split: Split, rng: random.Random) -> Filled:
    word, accept = rng.choice(OPPOSITES[split])
    return Filled({"word": word}, accept[0], {"type": "one_of", "accept": list(accept)}, word)


def _fill_sort(split: Split, rng: random.Random) -> Filled:
    words = rng.sample(SORT_WORDS[split], 3)
    chosen = ", ".join(sorted(words))
    return Filled({"words": ", ".join(words)}, chosen, {"type": "one_of", "accept": [chosen]})


def _fill_arithmetic(split: Split, rng: random.Random) -> Filled:
    small, more = sorted((rng.randint(1, 9), rng.randint(1, 9)))
    # A fifth of the additions and subtractions is never seen in training.
    while ((3 * small + more) % 5 == 0) != (split == "heldout"):
        small, more = sorted((rng.randint(1, 9), rng.randint(1, 9)))
    if rng.random() < 0.5:
        total, task = small + more, f"{_NUMBERS[more]} plus {_NUMBERS[small]}"
    else:
        total, task = more - small, f"{_NUMBERS[more]} minus {_NUMBERS[small]}"
    answer = _NUMBERS[total]
    near = min((_NUMBERS[other] for other in (total - 1, total + 1) if 0 <= other < len(_NUMBERS)), key=len)
    return Filled({"task": task}, answer, {"type": "one_of", "accept": [answer]}, near)


def _fill_units(split: Split, rng: random.Random) -> Filled:
    unit, part, factor = rng.choice(_UNITS[split])
    quantity = rng.choice(_QUANTITIES[split])
    value = quantity * factor
    return Filled({"amount": f"{quantity} {unit}", "part": part}, str(value), {"type": "number", "value": value})


YES_NO = Kind(
    name="yes_no",
    train=(
        "Is {item} {category}? Answer with one word, yes or no.",
        "Answer only yes or no: does '{item}' name {category}?",
        "Say yes or no, nothing else: {item} is {category}.",
        "Would you call '{item}' {category}? One word, yes or no.",
    ),
    heldout=(
        "Yes or no: is {item} {category}?",
        "Is '{item}' the name of {category}? Just yes, or just no.",
        "Someone says that {item} is {category}. Is it so? Only a yes or a no, please.",
    ),
    fill=_fill_yes_no,
)

ODD_ONE = Kind(
    name="odd_one",
    train=(
        "Which word does not belong: {words}? Answer with that word only.",
        "{words}\nOne of these is different. Write only that word.",
        "Pick the odd one out, one word, nothing else: {words}",
        "Find the word that does not fit and reply with it alone: {words}",
    ),
    heldout=(
        "What is the odd word in this row: {words}? The word alone, please.",
        "{words}: name the thing from another group and stop.",
        "Three of these go together: {words}. Type just the other one.",
    ),
    fill=_fill_odd_one,
)

OPPOSITE = Kind(
    name="opposite",
    train=(
        "What is the opposite of {word}? Answer with one word only.",
        "Give the opposite of '{word}' in a single word, nothing else.",
        "Opposite of {word}, one word:",
        "Reply with only the word that means the opposite of {word}.",
    ),
    heldout=(
        "In one word, what is the contrary of '{word}'?",
        "The reverse of {word}? Just the word, please.",
        "Not {word}, but what? Name the opposite by itself.",
    ),
    fill=_fill_opposite,
)

SORT = Kind(
    name="sort",
    train=(
        "Sort these words alphabetically, with commas between, nothing else: {words}",
        "Put in alphabetical order and write only the words: {words}",
        "{words}\nGive the same words in ABC order, separated by commas. No other text.",
        "Alphabetical order, only the list with commas: {words}",
    ),
    heldout=(
        "Arrange from A to Z: {words}. The row alone, please.",
        "How would a dictionary order {words}? Show them with commas and no comment.",
        "Put the word with the earliest letter first, the latest last, and just list them: {words}",
    ),
    fill=_fill_sort,
)

ARITHMETIC = Kind(
    name="arithmetic",
    train=(
        "What is {task}? Answer with one word.",
        "{task} = ? Write the result as a word, nothing else.",
        "Work out {task}. Reply with the number in letters only, one word.",
        "Say the result of {task} as one word, no digits.",
    ),
    heldout=(
        "How much does {task} make? Spell the number and add nothing.",
        "Please calculate {task}, and send just the outcome, spelled out.",
        "Fill in the missing number word by itself: {task} is ...",
    ),
    fill=_fill_arithmetic,
)

UNITS = Kind(
    name="units",
    train=(
        "How many {part} are in {amount}? Answer with the number only.",
        "Convert {amount} to {part}. Only the digits.",
        "{amount} = how many {part}? Write just the number, no unit.",
        "Give {amount} in {part} as a bare number, nothing else.",
    ),
    heldout=(
        "How many {part} make {amount}? Just the number, please.",
        "{amount} in {part}: the number alone.",
        "Change {amount} into {part} and send digits without a unit.",
    ),
    fill=_fill_units,
)
