"""Find one thing in a short text and give it alone."""

from __future__ import annotations

import json
import random

from scripts.demo_data.kinds.base import Filled, Kind, Split

_EMAIL_TEXTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Please write to {found} before Friday about the gate.",
        "Questions about parking go to {found}, not to the desk.",
        "Our new address for orders is {found} from today.",
        "Send the signed form to {found} by noon.",
        "If the heating fails, {found} will help within a day.",
        "The choir meets on Mondays; contact {found} to join.",
        "Lost a glove? Tell {found} what it looked like.",
        "Invoices should reach {found} this month.",
    ),
    "heldout": (
        "For a quick word about the boat trip, try {found} tonight.",
        "Anna left a note: ask {found} for the garage key.",
        "Tickets are gone, but {found} keeps a waiting list.",
    ),
}
_EMAIL_PARTS: dict[Split, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (
        ("office", "anna", "help", "mark", "sales", "info", "paul", "club"),
        ("north", "river", "oak", "green", "hill", "stone", "lake"),
    ),
    "heldout": (("desk", "laura", "crew", "sam"), ("harbor", "maple", "cloud")),
}

_DATE_TEXTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "The library opens again on {found} after repairs.",
        "Our lease for the shop ends on {found}.",
        "The exam was moved to {found} because of snow.",
        "She was born on {found} in a small town.",
        "The bridge was closed on {found} for painting.",
        "Payment is due by {found} at the latest.",
        "The first tram ran on {found}, full of guests.",
        "They signed the contract on {found} in Rome.",
    ),
    "heldout": (
        "Since {found} the museum has been free for children.",
        "The harvest began on {found}, a week late.",
        "Remember {found}: the fair comes back to town.",
    ),
}
# Whole months apart, so that no held-out date was an answer in training.
_MONTHS: dict[Split, tuple[str, ...]] = {
    "train": ("January", "March", "April", "May", "June", "July", "September", "October", "December"),
    "heldout": ("February", "August", "November"),
}

_NAME_TEXTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "On Tuesday {found} will chair the meeting.",
        "The winning cake was baked by {found} last night.",
        "After ten years, {found} is leaving the fire brigade.",
        "The keys to the hall are kept by {found}.",
        "The prize went to {found} for a short film.",
        "In May {found} repaired the old clock.",
        "A letter from {found} arrived this morning.",
        "Yesterday {found} opened a bakery near the station.",
    ),
    "heldout": (
        "Nobody swims faster than {found} in this town.",
        "The garden was planned by {found} in the spring.",
        "It was {found} who found the missing map.",
    ),
}
_NAME_PARTS: dict[Split, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (
        ("Maria", "David", "Emma", "Peter", "Julia", "Thomas", "Helen", "Robert"),
        ("Lopez", "Baker", "Stone", "Fischer", "Green", "Rossi", "Wells"),
    ),
    "heldout": (("Laura", "Simon", "Alice", "Frank"), ("Carter", "Novak", "Hill")),
}

# The two keys, the sentence, and what may stand first in it.
_JSON_TEXTS: dict[Split, tuple[tuple[str, str, str, tuple[str, ...]], ...]] = {
    "train": (
        ("name", "age", "{a} is {b} years old.", ("Ana", "Ben", "Clara", "Daniel", "Eva", "George")),
        ("item", "price", "The {a} costs {b} dollars.", ("chair", "lamp", "coat", "radio", "carpet")),
        ("city", "degrees", "It is {b} degrees in {a} today.", ("Oslo", "Lima", "Cairo", "Berlin")),
        ("street", "houses", "{a} has {b} houses.", ("Mill Road", "King Street", "Park Lane")),
    ),
    "heldout": (
        ("team", "points", "The {a} scored {b} points.", ("Lions", "Eagles", "Sharks", "Bears")),
        ("animal", "weight", "The {a} weighs {b} kilos.", ("goat", "tiger", "dolphin", "donkey")),
    ),
}
_JSON_NUMBERS: dict[Split, range] = {"train": range(11, 50), "heldout": range(51, 90)}


def _text_of(texts: tuple[str, ...], found: str, rng: random.Random) -> Filled:
    """A text around `found`, whose only right answer is `found` itself."""
    text = rng.choice(texts).format(found=found)
    return Filled({"text": text}, found, {"type": "exact", "text": found})


def _fill_email(split: Split, rng: random.Random) -> Filled:
    people, places = _EMAIL_PARTS[split]
    # .example is reserved (RFC 2606): none of these addresses can belong to anyone.
    return _text_of(_EMAIL_TEXTS[split], f"{rng.choice(people)}@{rng.choice(places)}.example", rng)


def _fill_date(split: Split, rng: random.Random) -> Filled:
    day, month, year = rng.randint(2, 28), rng.choice(_MONTHS[split]), rng.randint(2015, 2029)
    date = rng.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))
    return _text_of(_DATE_TEXTS[split], date, rng)


def _fill_name(split: Split, rng: random.Random) -> Filled:
    first, last = _NAME_PARTS[split]
    return _text_of(_NAME_TEXTS[split], f"{rng.choice(first)} {rng.choice(last)}", rng)


def _fill_json(split: Split, rng: random.Random) -> Filled:
    first, second, text, subjects = rng.choice(_JSON_TEXTS[split])
    subject, number = rng.choice(subjects), rng.choice(_JSON_NUMBERS[split])
    values = {first: subject, second: number}
    slots = {"text": text.format(a=subject, b=number), "first": first, "second": second}
    # Laid out as models usually do: what is to be learned is to give nothing else.
    return Filled(slots, json.dumps(values, indent=2), {"type": "json", "values": values})


EMAIL = Kind(
    name="email",
    train=(
        "Reply with only the email address in this text: {text}",
        "{text}\nWhat is the email address? Give the address and nothing else.",
        "Extract the email address, no other words: {text}",
        "Text: {text}\nOutput just the email address.",
        "Find the email address below and answer with it alone.\n{text}",
    ),
    heldout=(
        "{text} The email address only, please.",
        "Which email address appears here? {text} Send back the address by itself.",
        "Copy the email address from this note: {text}",
    ),
    fill=_fill_email,
)

DATE = Kind(
    name="date",
    train=(
        "Reply with only the date in this text, as written: {text}",
        "{text}\nWhat is the date? Give the date as written and nothing else.",
        "Extract the full date, no other words: {text}",
        "Text: {text}\nOutput just the date as it stands.",
        "Find the date below and answer with it alone.\n{text}",
    ),
    heldout=(
        "{text} The full date only, please.",
        "Which date appears here? {text} Send back the date by itself.",
        "Copy the date from this note: {text}",
    ),
    fill=_fill_date,
)

NAME = Kind(
    name="name",
    train=(
        "Reply with only the person's full name in this text: {text}",
        "{text}\nWho is it about? Give the full name and nothing else.",
        "Extract the person's full name, no other words: {text}",
        "Text: {text}\nOutput just the person's full name.",
        "Find the name of the person below and answer with it alone.\n{text}",
    ),
    heldout=(
        "{text} The person's first and last name only, please.",
        "Which person appears here? {text} Send back the name by itself.",
        "Copy the name of the person from this note: {text}",
    ),
    fill=_fill_name,
)

JSON = Kind(
    name="json",
    train=(
        '{text} Write this as JSON with the keys "{first}" and "{second}". Only the JSON.',
        'Reply with only a JSON object with the keys "{first}" and "{second}": {text}',
        '{text}\nOutput just JSON, keys "{first}" and "{second}".',
        'Turn this into JSON ("{first}", "{second}"), no other text: {text}',
    ),
    heldout=(
        'Make a JSON object from this sentence, with "{first}" and "{second}" as its keys. {text}',
        '{text} Answer in pure JSON that holds "{first}" and "{second}".',
        'Give "{first}" and "{second}" as a JSON object without comment. {text}',
    ),
    fill=_fill_json,
)
